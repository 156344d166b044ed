r"""Your own data: a table of texts with the names of their labels, or a folder in the raw format.

  python -m vixml_jax.main --data=products.csv --workdir=runs/NAME
  python -m vixml_jax.main --config=configs/custom.py --config.dataset.raw_dir=DIR --workdir=runs/NAME
  python -m vixml_jax.main --config=configs/custom.py:encoder=distilbert,images=3 --data=products.parquet \
      --config.features.checkpoint=siglip2_b16_256.npz --config.features.name=siglip2_b16_256 --config.features.dim=768

docs/data.md describes tables and raw folders. The encoder is all-MiniLM-L6-v2 by default, from the Python package that
the quickstart installs or else from the Hugging Face hub. Set --config.encoder.pretrained=FOLDER to use weights on your
disk. With encoder=qwen2.5-0.5b and the other decoders of configs/encoders.py, the base is frozen in bfloat16 and
adapters of rank 256 (--config.encoder.lora_rank) are trained.
Hardware: a CPU for thousands of queries; any accelerator for more, and for decoders.
"""

from ml_collections import ConfigDict

from configs import common
from configs.encoders import installed_weights


def get_config(variant: str | None = None) -> ConfigDict:
  """Returns the config; `variant` is the text after the colon of `--config`."""
  chosen = common.parse_variant(variant, encoder="minilm-l6", images="0", method="prime")
  config = common.base_config()
  config.name = "custom"
  config.dataset.name = "custom"
  common.use_encoder(config, chosen["encoder"])
  config.encoder.pretrained = installed_weights(chosen["encoder"]) or config.encoder.pretrained
  common.use_images(config, chosen["images"])
  if config.images:
    config.fusion.modality_dropout = 0.2  # So that the model also answers queries without images. The paper has 0.
  config.encoder.dtype = "auto"
  config.train.update(dict(epochs=20, minutes=-1.0, batch_size=512, warmup_steps=10))
  config.train.update(dict(free_vectors=0, row_length=0, chunk_rows=0, classifier_weight=-1.0))
  config.train.new_init = "fan_in"  # Prototypes have few steps to learn (docs/results.md).
  config.mining.update(dict(start_epoch=2, update_epochs=2, doubling_epochs=(8, 12)))
  config.dataset.validation_fraction = -1.0
  config.eval.update(dict(retrieval_choose=True, blend=True, classifier_share=-1.0, baselines=("tfidf", "untrained")))
  config.dataset.propensity_a, config.dataset.propensity_b = 0.55, 1.5
  config.train.sampling_a, config.train.sampling_b = 0.55, 1.5
  common.use_method(config, chosen["method"])
  return config
