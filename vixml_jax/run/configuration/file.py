"""Reads and writes the `config.json` of a run."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError
from vixml_jax.files import new_file, read_json_object
from vixml_jax.run.configuration.checking import check

_DAMAGED = "restore the file, or train again"

# Keys that were added after the first release -> their values for the runs of that release, whose files lack them.
_LATER_KEYS: dict[str, Any] = {
  "dataset.allow_empty_filter": False,
  "method": "prime",
  "encoder.residual_dtype": "",
  "encoder.base_dtype": "",
  "encoder.remat_saved": (),
  "train.chunks_in": "encoder",
  "train.minutes": 0.0,
  "train.classifier_weight": 0.0,
  "train.classifier_learning_rate": 0.02,
  "train.new_init": "fan_in",
  "train.matryoshka_dims": (),
  "encoder.attention": "auto",
  "loss.reverse_weight": 1.0,
  "train.decay_layer_norms": False,
  "eval.scann_recall": 0.0,
  "eval.retrieval_search": "separate",
  "eval.retrieval_query_hits": 0,
  "eval.blend": False,
  "eval.query_texts": False,
  "eval.classifier_epochs": 0,
  "eval.classifier_share": 0.0,
  "eval.baselines": (),
  "track.wandb_project": "",
  "track.mlflow_uri": "",
  "track.mlflow_experiment": "vixml_jax",
  "profile.steps": "",
  "eval.small_vectors": (),
}
_LATER_SECTIONS = ("track", "profile")
_LATER_KEYS_OF_DECODERS: dict[str, Any] = {
  "encoder.zero_centered_norm": False,
  "encoder.output_norm": False,
  "encoder.activation": "silu",
  "encoder.scale_embedding": False,
  "encoder.attention_scalar": 0,
  "encoder.global_every": 1,
  "encoder.window": 0,
  "encoder.local_rope_theta": 1e4,
}


def write(config: ConfigDict, path: Path) -> None:
  """Writes a config as JSON; after a kill or a power cut, the file is the old one or the new one.

  Raises:
    InputError: The disk is full.
  """
  with new_file(path) as work:
    work.write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(path: Path) -> ConfigDict:
  """Returns the config in a file that `write` has written, with the keys that were added since.

  Raises:
    InputError: The file cannot be read, contains no JSON object, or `check` refuses what it contains.
  """
  stored = read_json_object(path, absent="set --workdir to the folder of a run", damaged=_DAMAGED)
  try:
    config = ConfigDict(stored)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # A key with a dot, for example.
    raise InputError(f"{path}: is not a config ({' '.join(str(error).split())[:100]}); {_DAMAGED}") from error
  _add_later_keys(config)
  try:
    check(config)
  except InputError as error:
    raise InputError(f"{path}: {error}; {_DAMAGED}") from error
  return config


def _add_later_keys(config: ConfigDict) -> None:
  """Adds keys that are missing; a damaged file may lack their section, which `check` then names."""
  for name in _LATER_SECTIONS:
    if name not in config:
      config[name] = ConfigDict()
  encoder = config.get("encoder")
  is_decoder = isinstance(encoder, ConfigDict) and encoder.get("architecture") == "decoder"
  for key, value in (_LATER_KEYS | (_LATER_KEYS_OF_DECODERS if is_decoder else {})).items():
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
      section = section.get(part) if isinstance(section, ConfigDict) else None
    if isinstance(section, ConfigDict) and name not in section:
      section[name] = value
