"""LF-AmazonTitles-131K, text only: 294,805 training queries, 131,073 labels.

  python -m vixml_jax.main --config=configs/lf_amazon_titles_131k.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/lf_amazon_titles_131k.py:encoder=bert --config.dataset.raw_dir=DIR

Hardware: one 80 GB accelerator in the paper; any mesh here. Hours: not measured by us.
Published P@1 / P@5 / PSP@1 / R@100 (ViXML, arXiv 2511.13189, text only, 300 epochs):
  minilm-l3   41.72 / 20.16 / 36.17 / 64.68
  distilbert  44.86 / 21.45 / 39.62 / 68.05   (default)
  bert        45.87 / 21.88 / 40.54 / 69.67
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """The config; `variant` is what stands after the colon."""
  chosen = common.parse_variant(variant, encoder="distilbert")
  return common.published_config("lf_amazon_titles_131k", "lf_amazon_titles_131k", chosen["encoder"])
