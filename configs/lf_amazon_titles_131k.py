"""LF-AmazonTitles-131K: 294,805 training queries, 131,073 labels.

  python -m vixml_jax.main --config=configs/lf_amazon_titles_131k.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/lf_amazon_titles_131k.py:encoder=bert,images=3 --config.dataset.raw_dir=DIR

Hardware: one 80 GB accelerator in the paper; any mesh here. Hours: not measured by us.
Published P@1 / P@5 / PSP@1 / R@100 (ViXML, arXiv 2511.13189, text only, 300 epochs):
  minilm-l3   41.72 / 20.16 / 36.17 / 64.68
  distilbert  44.86 / 21.45 / 39.62 / 68.05   (default)
  bert        45.87 / 21.88 / 40.54 / 69.67
with 3 images (150 epochs):
  minilm-l3   47.18 / 22.69 / 41.01 / 73.81
  distilbert  49.55 / 23.73 / 43.78 / 76.73
  bert        50.50 / 24.08 / 44.67 / 78.43
Images need features: docs/images.md tells how to extract or import them.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """The config; `variant` is what stands after the colon."""
  chosen = common.parse_variant(variant, encoder="distilbert", images="0")
  return common.published_config("lf_amazon_titles_131k", "lf_amazon_titles_131k", chosen["encoder"], chosen["images"])
