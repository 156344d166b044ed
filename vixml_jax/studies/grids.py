"""The grid of each study: the runs that it compares, as changes of a config."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError

_Changes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A run of a study.

  Attributes:
    name: Name of the run in tables, such as "num_negatives=5".
    changes: Values by config key that differ from the config of the study. Empty for the config as it is.
  """

  name: str
  changes: _Changes = dataclasses.field(default_factory=dict)

  def config(self, base: ConfigDict, seed: int) -> ConfigDict:
    """Returns a copy of the study's config with the changes of the cell and a seed."""
    config = ConfigDict(base.to_dict())
    config.update_from_flattened_dict({**self.changes, "seed": seed})
    return config


# Architecture of a config -> names of the encoders that the study compares, as `encoder=` in config variants has them.
# Decoders have up to 1.7 billion parameters.
_ENCODERS = {
  "bert": ("minilm-l3", "minilm-l6", "distilbert", "bert"),
  "decoder": ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-0.6b", "qwen3-1.7b", "llama-3.2-1b", "gemma-3-270m", "gemma-3-1b"),
}
# Keys of the section `encoder` that say how it is computed and not what it is.
_KEPT_BY_ENCODERS = {
  f"encoder.{name}" for name in ("dtype", "residual_dtype", "base_dtype", "attention", "remat", "remat_saved")
}
# Keys of other sections that depend on the encoder.
_OF_AN_ENCODER = ("train.learning_rate", "train.decay_layer_norms", "prompt.eos")

BASE = Cell("as configured")
"""The config without changes, with which the other cells are compared."""


def cells_of(study: str, config: ConfigDict) -> list[Cell]:
  """Returns the cells of a study; the first is the config as it is.

  Args:
    study: Name of a study in `STUDIES`.
    config: The config of the study, which says what can be varied.

  Raises:
    InputError: The study does not exist, or the config lacks what it varies; the message says what to use.
  """
  from vixml_jax.run.configuration import flatten_config  # Late: the help of a command lists the studies.

  if study not in STUDIES:
    raise InputError(f"--study={study}: must be one of {', '.join(STUDIES)}")
  flat = flatten_config(config)
  different = [
    cell for cell in STUDIES[study](config) if any(flat.get(key) != cell.changes[key] for key in cell.changes)
  ]
  return [BASE, *different]


def _each(key: str, values: Sequence[Any]) -> list[Cell]:
  """Returns a cell for each value of a key."""
  return [Cell(f"{key.rpartition('.')[2]}={value}", {key: value}) for value in values]


def _mining(_: ConfigDict) -> list[Cell]:
  """Margins, number of negatives, cluster size, first epoch and interval of mining."""
  margins = [
    Cell(f"margin {low:g} to {high:g}", {"loss.margin_min": low, "loss.margin_max": high})
    for low, high in ((0.1, 0.1), (0.3, 0.3), (0.1, 0.3), (0.1, 0.5))
  ]
  return [
    *margins,
    *_each("loss.num_negatives", (1, 5, 10, 30)),
    *_each("mining.cluster_size", (1, 4, 16, 64)),
    *_each("mining.start_epoch", (0, 1, 2, 4)),
    *_each("mining.update_epochs", (1, 2, 4)),
  ]


def _prompts(config: ConfigDict) -> list[Cell]:
  """Every order of the parts of an item that the config's template has; an end token stays at the end."""
  words = config.prompt.template.split()
  end = [word for word in words if word == "eos"]
  parts = [word for word in words if word != "eos"]
  if len(parts) < 2:
    raise InputError(f"prompt.template={config.prompt.template}: the study prompts needs at least two parts to reorder")
  return _each("prompt.template", [" ".join([*order, *end]) for order in itertools.permutations(parts)])


def _images(config: ConfigDict) -> list[Cell]:
  """From no image of an item to as many as the config has, in training; each is tested with fewer images too."""
  _needs_images("images", config)
  tests = tuple(range(config.images))
  trained = [
    Cell(f"images={count}", {"images": count, "eval.test_images": tests[:count]}) for count in range(config.images)
  ]
  return [Cell("images in training, tested with fewer", {"eval.test_images": tests}), *trained]


def _adapters(config: ConfigDict) -> list[Cell]:
  """The maps from image features to tokens."""
  from vixml_jax.models.fusion import ADAPTERS  # Late, as above.

  _needs_images("adapters", config)
  return _each("fusion.adapter", ADAPTERS)


def _attention(config: ConfigDict) -> list[Cell]:
  """Causal and bidirectional attention of a decoder, with mean and last-token pooling."""
  if config.encoder.architecture != "decoder":
    raise InputError("the study attention needs a decoder, such as --config=configs/quickstart.py:encoder=qwen2.5-tiny")
  return [
    Cell(
      f"{'causal' if causal else 'bidirectional'}, {pooling}",
      {"encoder.bidirectional": not causal, "encoder.pooling": pooling},
    )
    for causal in (True, False)
    for pooling in ("mean", "last")
  ]


def _fusion(config: ConfigDict) -> list[Cell]:
  """Early and late fusion of images, and the weight of the residual of early fusion."""
  _needs_images("fusion", config)
  residuals = [
    Cell(f"early, residual {weight:g}", {"fusion.method": "early", "fusion.residual": weight})
    for weight in (0.0, 0.2, 0.4, 0.8)
  ]
  return [*residuals, Cell("late", {"fusion.method": "late", "fusion.residual": 0.0})]


def _methods(config: ConfigDict) -> list[Cell]:
  """PRIME, and the methods that it builds on, with the loss of their code."""
  rate = config.train.learning_rate
  fixed = {
    "loss.margin_min": 0.3,
    "loss.margin_max": 0.3,
    "loss.reverse_weight": 0.0,
    "train.free_vector_learning_rate": rate,
    "train.free_vector_init": "xavier",
  }
  return [Cell(f"method={method}", {"method": method, **fixed}) for method in ("ngame", "dexa")]


def _encoders(config: ConfigDict) -> list[Cell]:
  """Published encoders of the config's architecture, each with its learning rate and its end token."""
  from vixml_jax.run import named_configs  # Late: the help of a command lists the studies.
  from vixml_jax.run.configuration import flatten_config

  cells = []
  for name in _ENCODERS[config.encoder.architecture]:
    flat = flatten_config(named_configs.load(f"custom:encoder={name}"))
    changes = {key: flat[key] for key in flat if key.startswith("encoder.") and key not in _KEPT_BY_ENCODERS}
    cells.append(Cell(f"encoder={name}", changes | {key: flat[key] for key in _OF_AN_ENCODER}))
  return cells


def _seeds(_: ConfigDict) -> list[Cell]:
  """No changes: how much results vary with the seed."""
  return []


STUDIES: dict[str, Callable[[ConfigDict], list[Cell]]] = {
  "mining": _mining,
  "prompts": _prompts,
  "images": _images,
  "adapters": _adapters,
  "attention": _attention,
  "fusion": _fusion,
  "methods": _methods,
  "encoders": _encoders,
  "seeds": _seeds,
}
"""The cells of each study beside the config as it is. A cell that changes nothing is left out."""


def _needs_images(study: str, config: ConfigDict) -> None:
  if not config.images:
    raise InputError(f"the study {study} needs a config with images, such as --config=configs/quickstart.py:images=3")
