r"""LF-Amazon-131K (titles and contents): 294,805 training queries, 131,073 labels.

  python -m vixml_jax.main --config=configs/lf_amazon_131k.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/lf_amazon_131k.py:encoder=qwen2.5-3b,images=3 --config.dataset.raw_dir=DIR \
      --config.features.name=published

Hardware: one 80 GB accelerator in the paper; any mesh here.
Hours of distilbert on one H100, computed by aot_compile --topology=h100:1 for items of 128 tokens, not measured: at
least 7.4 and 13.7 expected; with 3 images at least 4.0 and 7.3 expected.
Published P@1 / P@5 / PSP@1 / R@100 (ViXML, arXiv 2511.13189, text only; 300 epochs,
30 for decoders, with rank-stabilized LoRA of rank 256):
  minilm-l3     41.99 / 20.42 / 35.44 / 68.37
  distilbert    47.98 / 23.21 / 40.99 / 76.22   (default; batch 1024 at 1e-4)
  bert          49.15 / 23.71 / 42.18 / 78.94   (batch 512 at 5e-5)
  qwen2.5-0.5b  49.23 / 23.99 / 42.40 / 81.24   (decoders: batch 512 at 2e-5)
  qwen2.5-3b    53.17 / 25.72 / 45.74 / 85.61
with 3 images (150 epochs, 30 for decoders):
  minilm-l3     46.88 / 22.63 / 39.97 / 75.80
  distilbert    51.30 / 24.69 / 44.09 / 81.40
  bert          52.28 / 25.12 / 45.08 / 83.40
  qwen2.5-0.5b  51.76 / 25.05 / 45.08 / 84.52
  qwen2.5-3b    55.11 / 26.46 / 47.73 / 87.73
best with retrieval augmentation:
                55.57 / 26.84 / 47.41 / 88.22
No number is published for qwen2.5-1.5b and qwen2.5-7b. Variant `robust` goes beyond the paper (configs/common.py).
docs/reproduce.md has every step, and docs/images.md describes how to get the features of images.
"""

from ml_collections import ConfigDict

from configs import common

# Encoder -> batch size and learning rate. Long texts have smaller ones than titles.
_RECIPES = {"distilbert": (1024, 1e-4), "bert": (512, 5e-5), "decoder": (512, 2e-5)}


def get_config(variant: str | None = None) -> ConfigDict:
  """Returns the config; `variant` is the text after the colon of `--config`."""
  config = common.published_config("lf_amazon_131k", "lf_amazon_131k", variant, _RECIPES)
  config.dataset.text_fields = ("title", "content")
  config.dataset.max_length = 128
  # A row holds two items of the maximum length, each with its images.
  config.train.row_length = -(-2 * (config.dataset.max_length + config.images) // 8) * 8
  if common.is_decoder(config):
    config.train.update(dict(row_length=288, chunk_rows=512))  # Also with the phrases of the prompt.
  return config
