"""Describes the model and the start of a run, without allocating anything.

  python -m vixml_jax.describe --config=quickstart:images=3 [--config.mesh.fsdp=4 ...] [--devices=4]
      [--num_queries=N --num_labels=L] [--json=FILE]
  python -m vixml_jax.describe --workdir=runs/NAME

Prints the tree of modules with shapes, logical axes, the mesh axes that share each dimension, types, numbers of
parameters and bytes on each device; the bytes of the train state; and a numbered list of what initializes the run. Of a
workdir it also prints the provenance: commands, versions, revision, hashes of data and weights, devices, flags of XLA.
It needs no data and no weights, and the devices need not exist.
"""

import os
from pathlib import Path

from absl import flags

from vixml_jax import cli, config_flag
from vixml_jax.errors import InputError
from vixml_jax.run.workdir import CONFIG

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run to describe instead of a config.")
_DEVICES = flags.DEFINE_integer(
  "devices",
  None,
  "Number of devices; default: the product of the sizes of config.mesh, or 1 if one of them is left open.",
  lower_bound=1,
)
_QUERIES = flags.DEFINE_integer(
  "num_queries", None, "Number of training queries; by default the published number, else that of the prepared data."
)
_LABELS = flags.DEFINE_integer(
  "num_labels", None, "Number of labels; by default the published number, else that of the prepared data."
)
_JSON = flags.DEFINE_string("json", None, "File to write the same to, as JSON.")


def main() -> None:
  """Describes the config or the workdir of the flags."""
  from vixml_jax.ahead_of_time.description import describe
  from vixml_jax.ahead_of_time.description_text import description_json, description_text
  from vixml_jax.ahead_of_time.sizes import data_size
  from vixml_jax.files import write_json
  from vixml_jax.run import configuration

  if (_CONFIG.value is None) == (_WORKDIR.value is None):
    raise InputError("--config: must be given, or --workdir, and not both")
  workdir = None if _WORKDIR.value is None else Path(_WORKDIR.value)
  config = cli.required(_CONFIG) if workdir is None else configuration.read(workdir / CONFIG)
  configuration.check(config)
  size = data_size(config, _QUERIES.value, _LABELS.value)
  description = describe(config, size, _DEVICES.value, workdir)
  if _JSON.value is not None:
    try:
      write_json(Path(_JSON.value), description_json(description))
    except OSError as error:
      raise InputError(f"{_JSON.value}: cannot be written ({error.strerror}); give another file to --json") from error
  print(description_text(description))


if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"  # No device is used, so none is taken from a run that uses it.
  cli.run(main)
