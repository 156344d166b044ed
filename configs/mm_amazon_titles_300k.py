"""MM-AmazonTitles-300K, text only: 586,781 training queries, 303,296 labels.

  python -m vixml_jax.main --config=configs/mm_amazon_titles_300k.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/mm_amazon_titles_300k.py:encoder=bert --config.dataset.raw_dir=DIR

Hardware: one 80 GB accelerator in the paper; any mesh here. Hours: not measured by us.
Published P@1 / P@5 / PSP@1 / R@100 (ViXML, arXiv 2511.13189, text only, 300 epochs):
  minilm-l3   49.54 / 31.93 / 33.83 / 69.30
  distilbert  52.40 / 34.29 / 36.36 / 72.59   (default)
  bert        52.95 / 34.57 / 36.85 / 73.34
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """The config; `variant` is what stands after the colon."""
  chosen = common.parse_variant(variant, encoder="distilbert")
  return common.published_config("mm_amazon_titles_300k", "mm_amazon_titles_300k", chosen["encoder"])
