"""Exports a trained workdir for other libraries.

  python -m vixml_jax.export --workdir=runs/NAME --format=hf|peft|sentence-transformers|onnx|label-vectors --output=DIR
      [--dtype=float32|bfloat16|float16|int8] [--max_shard_size=5GB] [--image_checkpoint=TOWER] [--dims=96]

hf: the encoder with merged adapters, for transformers. peft: the adapters alone. sentence-transformers: a model that
gives texts the same embeddings as evaluation. onnx: the same as a file for ONNX Runtime, in float32 or int8; it
takes images as well, and their tower is a second file (the extra onnx must be installed). label-vectors: the label
prototypes as Parquet, for vector databases, in float32 or float16. Each folder has a model card, README.md. No training
data are needed.
"""

import re

from absl import flags

from vixml_jax import cli
from vixml_jax.errors import InputError
from vixml_jax.exporting.formats import DTYPES, FORMATS

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that vixml_jax.main wrote, or its URL in a bucket.")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format to write.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to create.")
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  DTYPES,
  "Type of the weights or vectors; the smaller types round merged adapters. --format=onnx has float32 and int8, "
  "label-vectors float32 and float16, peft float32.",
)
_MAX_SHARD_SIZE = flags.DEFINE_string(
  "max_shard_size", "5GB", "Maximum size of one file of weights, such as 500MB or 5GB."
)
_IMAGE_CHECKPOINT = flags.DEFINE_string(
  "image_checkpoint",
  None,
  "Image tower that made the training features, for --format=onnx; by default the one that the run recorded.",
)
_DIMS = flags.DEFINE_integer(
  "dims",
  None,
  "Number of first dimensions of the vectors, at the norm of whole ones, for --format=label-vectors; by default all.",
  lower_bound=1,
)


def main() -> None:
  """Exports the workdir that the flags name."""
  from vixml_jax.exporting.export import export
  from vixml_jax.inference.remote_workdir import local_workdir
  from vixml_jax.remote import is_remote

  workdir, kind, output = (cli.required(flag) for flag in (_WORKDIR, _FORMAT, _OUTPUT))
  export(
    local_workdir(workdir) if is_remote(workdir) else cli.local_path(workdir, "workdir"),
    kind,
    cli.local_path(output, "output"),
    _DTYPE.value,
    _bytes(_MAX_SHARD_SIZE.value),
    _IMAGE_CHECKPOINT.value,
    _DIMS.value,
  )
  print(f"{kind} in {output}")


def _bytes(size: str) -> int:
  number = re.fullmatch(r"(\d+) ?([KMG])B", size)
  if not number or not int(number[1]):
    raise InputError(f"--max_shard_size={size}: must be a whole number of KB, MB or GB, such as 5GB")
  return int(number[1]) * 1000 ** ("KMG".index(number[2]) + 1)


if __name__ == "__main__":
  cli.run(main, saved="an export that is not complete is not saved")
