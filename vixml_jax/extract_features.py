"""Makes SigLIP features of a data set's images, or imports the published ones; does nothing where that has been done.

  python -m vixml_jax.extract_features --config=configs/X.py --checkpoint=siglip2_so400m14_384.npz
      [--variant=siglip2_so400m14_384] [--preprocessing=big_vision|huggingface|huggingface_bilinear]
      [--images=DIR|'DIR/{split}/*.parquet'] [--name=NAME] [--batch_size=64] [--dtype=float32|bfloat16]
  python -m vixml_jax.extract_features --config=configs/X.py --published=DIR [--name=NAME]

The features go to config.dataset.data_dir, as the TFDS set DATASET_features/NAME. docs/images.md tells of images in
folders, from URLs and in parquet files, and of what becomes of bad ones.
"""

from absl import flags
from ml_collections import config_flags

from vixml_jax import cli
from vixml_jax.datasets import prepare
from vixml_jax.errors import InputError
from vixml_jax.images.extraction import prepare_features
from vixml_jax.images.preprocess import PREPROCESSING
from vixml_jax.images.published_features import import_published
from vixml_jax.run import configuration

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; variants stand after a colon.")
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "SigLIP: an .npz of big_vision, a Hugging Face folder, or a name on the hub."
)
_VARIANT = flags.DEFINE_string("variant", None, "Which published tower the checkpoint has to be.")
_PREPROCESSING = flags.DEFINE_enum("preprocessing", "big_vision", list(PREPROCESSING), "How images become pixels.")
_IMAGES = flags.DEFINE_string(
  "images", "", "Folder with trn, tst, lbl, or parquet files with {split} in their name; by default the data set's."
)
_NAME = flags.DEFINE_string("name", "", "What to call the features; by default after variant or checkpoint.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images a step, of each process.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16"], "Of the computation; by default float32 on CPUs, bfloat16 elsewhere."
)
_PUBLISHED = flags.DEFINE_string("published", None, "Folder with the paper's *_embs_imgs_*.npy and *_map.npy files.")


def main() -> None:
  """Makes or imports the features that the flags name."""
  config = cli.required(_CONFIG)
  configuration.check(config)
  if _PUBLISHED.value and _CHECKPOINT.value:
    raise InputError("--published and --checkpoint: give one of them, the features or the tower to make them with")
  checkpoint = "" if _PUBLISHED.value else cli.required(_CHECKPOINT)
  data = config.dataset
  builder = prepare(data.name, data.raw_dir, data.data_dir)
  if _PUBLISHED.value:
    import_published(builder, data.data_dir, _PUBLISHED.value, _NAME.value or "published")
  else:
    prepare_features(
      builder,
      data.data_dir,
      checkpoint,
      name=_NAME.value,
      variant=_VARIANT.value,
      preprocessing=_PREPROCESSING.value,
      images=_IMAGES.value,
      batch_size=_BATCH_SIZE.value,
      dtype=_DTYPE.value or "",
    )


if __name__ == "__main__":
  cli.run(main)
