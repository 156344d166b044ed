"""LF-AmazonTitles-1.3M: 2,248,619 training queries, 1,305,265 labels.

  python -m vixml_jax.main --config=configs/lf_amazon_1.3m.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/lf_amazon_1.3m.py:encoder=qwen2.5-3b,images=3 --config.dataset.raw_dir=DIR

Hardware: one 80 GB accelerator in the paper; any mesh here. Hours: not measured by us (the paper, with images
on one H100: DistilBERT 4.3 h, Qwen2.5-3B 178 h).
Published P@1 / P@5 / PSP@1 / R@100 (ViXML, arXiv 2511.13189, text only; 300 epochs,
40 for decoders, with rank-stabilized LoRA of rank 256):
  minilm-l3     51.59 / 39.28 / 29.50 / 58.44
  distilbert    58.49 / 45.27 / 33.28 / 63.76   (default)
  bert          59.10 / 45.62 / 34.10 / 64.30
  qwen2.5-0.5b  58.02 / 45.11 / 31.68 / 63.96
  qwen2.5-3b    60.74 / 47.39 / 34.01 / 66.88
with 3 images (150 epochs, 40 for decoders):
  minilm-l3     60.36 / 45.78 / 34.88 / 67.35
  distilbert    64.17 / 49.43 / 36.58 / 70.65
  bert          64.59 / 49.66 / 37.35 / 71.08
  qwen2.5-0.5b  63.57 / 49.08 / 35.21 / 70.35
  qwen2.5-3b    66.01 / 51.21 / 37.71 / 73.13
Images need features; docs/images.md describes how to extract or import them.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """Returns the config; `variant` is the text after the colon of `--config`."""
  chosen = common.parse_variant(variant, encoder="distilbert", images="0")
  config = common.published_config("lf_amazon_1.3m", "lf_amazon_titles_1_3m", chosen["encoder"], chosen["images"])
  config.train.bank_dtype = "bfloat16"  # 2.2 million x 768 values take 3.5 GB instead of 6.9 GB.
  if common.is_decoder(config):
    config.train.epochs = 40
  return config
