r"""LF-AmazonTitles-131K: 294,805 training queries, 131,073 labels.

  python -m vixml_jax.main --config=configs/lf_amazon_titles_131k.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/lf_amazon_titles_131k.py:encoder=qwen2.5-3b,images=3 \
      --config.dataset.raw_dir=DIR --config.features.name=published

Hardware: one 80 GB accelerator in the paper; any mesh here.
Hours of distilbert on one H100, computed by aot_compile --topology=h100:1, not measured: at least 0.6 and 1.1 expected;
with 3 images at least 0.4 and 0.7 expected. From the paper's times on LF-AmazonTitles-1.3M, by queries times epochs:
with 3 images distilbert 0.6, qwen2.5-3b 17.5.
Published P@1 / P@5 / PSP@1 / R@100 (ViXML, arXiv 2511.13189, text only; 300 epochs,
30 for decoders, with rank-stabilized LoRA of rank 256):
  minilm-l3     41.72 / 20.16 / 36.17 / 64.68
  distilbert    44.86 / 21.45 / 39.62 / 68.05   (default)
  bert          45.87 / 21.88 / 40.54 / 69.67
  qwen2.5-0.5b  44.84 / 21.66 / 39.64 / 70.30
  qwen2.5-3b    47.42 / 22.89 / 41.88 / 74.34
  qwen2.5-7b    48.06 / 23.07 / 42.43 / 75.24   (batch 1024)
with 3 images (150 epochs, 30 for decoders):
  minilm-l3     47.18 / 22.69 / 41.01 / 73.81
  distilbert    49.55 / 23.73 / 43.78 / 76.73
  bert          50.50 / 24.08 / 44.67 / 78.43
  qwen2.5-0.5b  50.27 / 24.22 / 44.31 / 79.41
  qwen2.5-3b    52.47 / 25.26 / 46.46 / 82.21
  qwen2.5-7b    52.75 / 25.37 / 46.70 / 83.27
best with retrieval augmentation:
                53.08 / 25.74 / 46.22 / 83.88
P@1 of distilbert by method, text only -> with 3 images (method=ngame, method=dexa, the default method=prime):
  ngame 42.47 -> 47.81, dexa 44.38 -> 49.48, prime 44.86 -> 49.55
No number is published for qwen2.5-1.5b. Variant `robust` goes beyond the paper (configs/common.py).
docs/reproduce.md has every step, and docs/images.md describes how to get the features of images.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """Returns the config; `variant` is the text after the colon of `--config`."""
  return common.published_config("lf_amazon_titles_131k", "lf_amazon_titles_131k", variant)
