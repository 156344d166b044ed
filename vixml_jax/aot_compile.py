"""Compiles every program of a run for TPUs or GPUs, and reports whether it fits, what it costs and how long it takes.

  python -m vixml_jax.aot_compile --config=configs/lf_amazon_1.3m.py:encoder=qwen2.5-3b --topology=v5e:4x4
      [--config.mesh.fsdp=4 ...] [--num_queries=N --num_labels=L] [--tokens_per_item=15] [--images_per_item=3]
      [--json=FILE] [--search=12]

Topologies: slices of TPUs (v5e:4x4, v5p:2x2x4, v6e:16x16) and GPUs of a host (h100:1, h100:8, h200:1, a100:1). Needs a
compiler for these (pip install 'vixml-jax[tpu]' or 'vixml-jax[aot-gpu]'), but no TPU or GPU, no data and no
weights. If the config does not fit, prints the nearest mesh and chunk size that do, and exits with status 1. With
`--search=N`, compiles the training step only, with other meshes, chunk sizes and choices of what is recomputed, and
prints the fastest that fits. docs/scaling.md explains the tables.
"""

import os
from pathlib import Path
import sys

from absl import flags

from vixml_jax import cli, config_flag

_CONFIG = config_flag.define()
_TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and number of chips: v5e:4x4, v5p:2x2x4, h100:8, h200:1, ...")
_QUERIES = flags.DEFINE_integer(
  "num_queries", None, "Number of training queries; by default the published number, else that of the prepared data."
)
_LABELS = flags.DEFINE_integer(
  "num_labels", None, "Number of labels; by default the published number, else that of the prepared data."
)
_TOKENS = flags.DEFINE_float("tokens_per_item", None, "Mean number of tokens of a text; by default assumed.")
_IMAGES = flags.DEFINE_float("images_per_item", None, "Mean number of images of an item; by default config.images.")
_JSON = flags.DEFINE_string("json", None, "File to write the same numbers to, as JSON.")
_SEARCH = flags.DEFINE_integer(
  "search",
  0,
  "Maximum number of training steps to compile in search of the fastest that fits; 0 for no search.",
  lower_bound=0,
)


def main() -> None:
  """Compiles the config of the flags; exits with status 1 if it does not fit."""
  from vixml_jax.ahead_of_time.report import check_fit, find_fastest
  from vixml_jax.ahead_of_time.sizes import data_size
  from vixml_jax.ahead_of_time.topology import machine_of
  from vixml_jax.run import configuration

  config, topology = cli.required(_CONFIG), cli.required(_TOPOLOGY)
  configuration.check(config)
  size = data_size(config, _QUERIES.value, _LABELS.value, _TOKENS.value, _IMAGES.value)
  machine, json_path = machine_of(topology), Path(_JSON.value) if _JSON.value else None
  if _SEARCH.value:
    fits = find_fastest(config, machine, size, _SEARCH.value, json_path)
  else:
    fits = check_fit(config, machine, size, json_path)
  if not fits:
    sys.exit(1)


if __name__ == "__main__":
  # Programs are only traced on this machine, so neither libtpu nor CUDA must look for a device.
  os.environ["JAX_PLATFORMS"] = "cpu"
  cli.run(main)
