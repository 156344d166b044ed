"""The embedded data set of icons (17,083 queries, 9,527 labels), trained from the pretrained MiniLM-L6.

  make quickstart
  python -m vixml_jax.main --config=configs/quickstart.py:images=3

Variants, after a colon (measured numbers are in docs/results.md):
  (none)      a few minutes on 2 CPU cores.
  reference   the recipe with which the published PyTorch code was run on this set.
  full        the best recipe found, within an hour on 2 cores.
  images=3    can be added to each of them, as in `full,images=3`: up to 3 images per icon, as vectors of the small
              tower in the package (docs/icon_tower.md). Missing vectors are extracted first. Without it, the model
              uses texts only. `make quickstart` runs this variant alone.
  encoder=qwen2.5-tiny    can be added to each of them: a decoder of 4 layers. No decoder of this size was ever
              pretrained, so its weights are random (`encoder.random_init`) and all of them are trained; its tokenizer
              is MiniLM's. The scores only show that it learns. --config.encoder.lora_rank=8 trains adapters instead.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import common
from configs.encoders import installed_weights
import vixml_jax

_TOWER = Path(vixml_jax.__file__).parent / "datasets" / "mm_icons_9k" / "icon_tower.npz"


def get_config(variant: str | None = None) -> ConfigDict:
  """Returns the config; `variant` is the text after the colon of `--config`."""
  options = common.parse_variant(variant, variant="", images="0", encoder="minilm-l6")
  chosen = options["variant"]
  config = common.base_config()
  config.name = "quickstart" + (f"-{chosen}" if chosen else "")
  config.dataset.name = "mm_icons_9k"
  config.dataset.propensity_a, config.dataset.propensity_b = 0.55, 1.5
  common.use_encoder(config, options["encoder"])
  if options["encoder"] == "minilm-l6":
    config.encoder.pretrained = installed_weights("minilm-l6") or config.encoder.pretrained
  else:
    config.name += f"-{options['encoder']}"
  if config.encoder.random_init:
    # With only the ten hardest negatives, the vectors of an untrained encoder collapse to one point. Nearly all
    # negatives of the batch, with almost equal weights, spread the vectors.
    config.loss.update(dict(num_negatives=500, temperature=1.0))
  config.encoder.dtype = "float32"  # bfloat16 is emulated on most CPUs.
  # A batch is one chunk, and the eight devices of a host divide it.
  config.train.update(dict(batch_size=512, row_length=48, chunk_rows=96, remat=False, log_every_steps=10))
  config.checkpoint.every_steps = 100
  common.use_images(config, options["images"])
  if config.images:
    config.features.update(dict(name="icon_tower", dim=192, checkpoint=str(_TOWER)))
    config.train.chunk_rows = 104  # Images are tokens as well.
    # The encoder does not learn to use images in so few steps. The residual makes items with similar images similar
    # from the start (docs/results.md).
    config.fusion.residual = 0.4
    config.fusion.modality_dropout = 0.2  # So that the model also answers queries without images.
    config.eval.test_images = (0,)  # Also evaluates the test queries without their images.
  # The recipe with which the published code was run on this set.
  config.train.update(dict(new_learning_rate=2e-4, free_vector_learning_rate=2e-4, free_vectors=2048))
  config.mining.update(dict(start_epoch=2, update_epochs=2, doubling_epochs=()))
  if chosen == "reference":
    config.train.epochs = 5
    return config
  # Prototypes have few steps to learn. With the initial values of torch, plain search is four points worse.
  config.train.new_init = "fan_in"
  config.dataset.validation_fraction = 0.05
  config.eval.update(dict(retrieval_choose=True, blend=True, classifier_share=-1.0, baselines=("tfidf", "untrained")))
  config.train.warmup_steps = 50
  if chosen == "":
    # The paper's rates for parameters without pretraining: prototypes must be learned in 160 steps.
    config.train.update(dict(epochs=5, new_learning_rate=5e-4, free_vector_learning_rate=5e-4, classifier_weight=0.3))
  elif chosen == "full":
    # A free vector for each label, a high rate, and positives drawn almost uniformly: so prototypes learn which labels
    # are frequent for which words. A rare label that shares the vector of a frequent one, or that is trained at a rate
    # of 5e-3, can be ranked first for unrelated queries.
    config.train.update(
      dict(
        epochs=10,
        sampling_a=0.25,
        sampling_b=1.5,
        new_learning_rate=1e-3,
        free_vector_learning_rate=2e-3,
        free_vectors=16384,
      )
    )
    config.mining.update(dict(start_epoch=1, doubling_epochs=(3, 5, 7)))
  else:
    raise ValueError(f"variant {chosen!r}: must be reference or full")
  return config
