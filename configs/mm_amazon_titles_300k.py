r"""MM-AmazonTitles-300K: 586,781 training queries, 303,296 labels.

  python -m vixml_jax.main --config=configs/mm_amazon_titles_300k.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/mm_amazon_titles_300k.py:encoder=qwen2.5-3b,images=3 \
      --config.dataset.raw_dir=DIR --config.features.name=published

Hardware: one 80 GB accelerator in the paper; any mesh here.
Hours of distilbert on one H100, computed by aot_compile --topology=h100:1, not measured: with 3 images at least 0.7 and
1.3 expected; text only at least 1.2 and 2.2 expected, by the training step of LF-AmazonTitles-131K. From the paper's
times on LF-AmazonTitles-1.3M, by queries times epochs: with 3 images distilbert 1.1, qwen2.5-3b 35.
Published P@1 / P@5 / PSP@1 / R@100 (ViXML, arXiv 2511.13189, text only; 300 epochs,
30 for decoders, with rank-stabilized LoRA of rank 256):
  minilm-l3     49.54 / 31.93 / 33.83 / 69.30
  distilbert    52.40 / 34.29 / 36.36 / 72.59   (default)
  bert          52.95 / 34.57 / 36.85 / 73.34
  qwen2.5-0.5b  52.30 / 34.23 / 36.22 / 74.44
  qwen2.5-3b    54.71 / 35.93 / 36.29 / 77.22
with 3 images (150 epochs, 30 for decoders):
  minilm-l3     52.97 / 34.13 / 35.51 / 73.08
  distilbert    55.03 / 35.91 / 37.52 / 76.07
  bert          55.59 / 36.10 / 37.83 / 76.67
  qwen2.5-0.5b  55.28 / 36.09 / 36.48 / 77.61
  qwen2.5-3b    56.55 / 37.04 / 37.60 / 79.38
best with retrieval augmentation:
                57.37 / 38.08 / 36.12 / 80.85
P@1 of distilbert by number of images: 0 52.40, 1 54.51, 2 54.80, 3 55.03, 5 55.10; with late fusion
(--config.fusion.method=late) and 3 images 53.44.
No number is published for qwen2.5-1.5b and qwen2.5-7b. Variant `robust` goes beyond the paper (configs/common.py).
docs/reproduce.md has every step, and docs/images.md describes how to get the features of images.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """Returns the config; `variant` is the text after the colon of `--config`."""
  return common.published_config("mm_amazon_titles_300k", "mm_amazon_titles_300k", variant)
