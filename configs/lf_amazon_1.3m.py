r"""LF-AmazonTitles-1.3M: 2,248,619 training queries, 1,305,265 labels.

  python -m vixml_jax.main --config=configs/lf_amazon_1.3m.py --config.dataset.raw_dir=DIR
  python -m vixml_jax.main --config=configs/lf_amazon_1.3m.py:encoder=qwen2.5-3b,images=3 --config.dataset.raw_dir=DIR \
      --config.features.name=published

Hardware: one 80 GB accelerator in the paper; any mesh here. docs/scaling.md lists TPU slices and GPUs that fit.
Hours on one H100 with 3 images, from the paper: distilbert 4.3, qwen2.5-3b 178. Computed by aot_compile, not measured:
distilbert on h100:1 with 3 images at least 2.8 and 5.2 expected; text only at least 4.5 and 8.4 expected, by the
training step of LF-AmazonTitles-131K; qwen2.5-3b with 3 images on v5e:4x4 at least 8.6 and 13.1 expected.
docs/scaling.md has other machines.
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
best with retrieval augmentation:
                67.83 / 53.72 / 35.40 / 76.76
No number is published for qwen2.5-1.5b and qwen2.5-7b. Variant `robust` goes beyond the paper (configs/common.py).
docs/reproduce.md has every step, and docs/images.md describes how to get the features of images.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  """Returns the config; `variant` is the text after the colon of `--config`."""
  config = common.published_config("lf_amazon_1.3m", "lf_amazon_titles_1_3m", variant)
  config.train.bank_dtype = "bfloat16"  # 2.2 million x 768 values take 3.5 GB instead of 6.9 GB.
  if common.is_decoder(config):
    config.train.epochs = 40
  return config
