"""Makes features of the images of a data set, or imports the published ones, if that has not been done.

  python -m vixml_jax.extract_features --config=configs/X.py --checkpoint=siglip2_so400m14_384.npz
      [--variant=siglip2_so400m14_384] [--preprocessing=big_vision|huggingface|huggingface_bilinear|processor]
      [--images=DIR|'DIR/{split}/*.parquet'] [--name=NAME] [--batch_size=64] [--dtype=float32|bfloat16]
      [--num_processes=8 --process=0]
  python -m vixml_jax.extract_features --config=configs/X.py --published=DIR [--name=NAME]
  python -m vixml_jax.extract_features --data=products.csv --checkpoint=siglip2_b16_256.npz

The features are written to config.dataset.data_dir as the TFDS data set DATASET_features/NAME. docs/images.md describes
images in folders, from URLs and in parquet files, and what happens to images that cannot be read. Several processes
that see the same folders divide the images; each is started with its number.
"""

from absl import flags

from vixml_jax import cli, config_flag, data_flags
from vixml_jax.errors import InputError
from vixml_jax.images.preprocess import AUTO, KINDS

_CONFIG = config_flag.define()
_DATA = data_flags.define_data_flags()
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Tower: an .npz of big_vision (SigLIP), or a Hugging Face folder or a name on the hub (SigLIP, CLIP or DINOv2).",
)
_VARIANT = flags.DEFINE_string("variant", None, "Published SigLIP that the checkpoint must be.")
_PREPROCESSING = flags.DEFINE_enum(
  "preprocessing",
  AUTO,
  list(KINDS),
  "How images are resized; auto is big_vision for SigLIP and processor (preprocessor_config.json) for CLIP and DINOv2.",
)
_IMAGES = flags.DEFINE_string(
  "images",
  "",
  "Folder with trn, tst, lbl, or paths of parquet files with {split} in them; by default the images of the data set.",
)
_NAME = flags.DEFINE_string("name", "", "Name of the features; by default that of the variant or the checkpoint.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Number of images per step of each process.")
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "Type in which the tower computes; by default float32 on CPUs, bfloat16 elsewhere.",
)
_PUBLISHED = flags.DEFINE_string(
  "published", None, "Folder with the *_embs_imgs_*.npy and *_map.npy files of the paper."
)


def main() -> None:
  """Makes or imports the features in the flags."""
  from vixml_jax.datasets.bucket_sets import prepare_shared, shared_sets
  from vixml_jax.images.extraction import feature_name, prepare_features
  from vixml_jax.images.published_features import import_published
  from vixml_jax.remote import MOUNT, is_remote
  from vixml_jax.run import configuration

  config = cli.required(_CONFIG)
  configuration.check(config)
  if _PUBLISHED.value and _CHECKPOINT.value:
    raise InputError("--published and --checkpoint: set only one of them, the features or the tower that makes them")
  share = cli.process_share()
  if share.count > 1 and is_remote(config.dataset.data_dir):
    raise InputError(
      f"--config.dataset.data_dir={config.dataset.data_dir}: a bucket serves one process, and there are {share.count}; "
      f"{MOUNT}"
    )
  _DATA.set_raw_dir(config)
  checkpoint = "" if _PUBLISHED.value else cli.required(_CHECKPOINT)
  data = config.dataset
  builder = prepare_shared(data.name, data.raw_dir, data.data_dir, data.allow_empty_filter)
  name = _NAME.value or ("published" if _PUBLISHED.value else feature_name(checkpoint, _VARIANT.value))
  with shared_sets(data.data_dir, f"{builder.name}_features/{name}") as data_dir:
    if _PUBLISHED.value:
      import_published(builder, data_dir, _PUBLISHED.value, name)
    else:
      prepare_features(
        builder,
        data_dir,
        checkpoint,
        name=name,
        variant=_VARIANT.value,
        preprocessing=_PREPROCESSING.value,
        images=_IMAGES.value,
        batch_size=_BATCH_SIZE.value,
        dtype=_DTYPE.value or "",
        share=share,
      )


if __name__ == "__main__":
  cli.run(main, data_flags.with_default_config, divides=True, saved="finished parts are saved")
