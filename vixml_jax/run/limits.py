"""Refuses a run that the memory of the machine or the width of its numbers cannot hold, before anything is computed.

The bytes are lower bounds of what a run needs, so no run that could work is refused. `aot_compile` computes the memory
of every program. A run that passes and still needs too much ends with `not_enough_memory`'s line.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
from typing import ParamSpec, TypeVar

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.input.batches import steps_per_epoch
from vixml_jax.models.attention import choose
from vixml_jax.models.attention_call import REFERENCE
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.run.from_config import attention_call
from vixml_jax.run.state import abstract_model_part, abstract_params

_P = ParamSpec("_P")
_T = TypeVar("_T")

_GIB = 2.0**30
_MOST_STEPS = 2**31 - 1  # Steps are int32.
_COPIES = 3  # Of a trained parameter: its value and the two moments of Adam.
_FLOAT32 = 4
# Of the similarities of a batch: queries to labels, queries to prototypes, and the gradient of one of them.
_SIMILARITIES = 3


def check_limits(config: ConfigDict, model: ModelDefinition, mesh: Mesh, num_queries: int, num_labels: int) -> None:
  """Checks the number of steps, the parameters and tables, the similarities of a batch and a chunk's activations.

  Args:
    config: The whole config, with everything chosen.
    model: Definition of the model.
    mesh: The devices.
    num_queries: N, the training queries of an epoch.
    num_labels: L.

  Raises:
    InputError: A limit is exceeded; the message names the keys and both numbers.
  """
  device, steps = float(sharding.device_memory(mesh.local_devices)), _num_steps(config, num_queries)
  if steps > _MOST_STEPS:
    raise InputError(
      f"config.train.epochs={config.train.epochs}: {steps:,} steps of config.train.batch_size="
      f"{config.train.batch_size} are more than {_MOST_STEPS:,}; use fewer epochs, or larger batches"
    )
  _check(
    _state_bytes(config, model, mesh, num_queries, num_labels),
    device,
    "the parameters of encoder, prototype and fusion, config.train.free_vectors="
    f"{config.train.free_vectors} and the tables of {num_queries:,} queries and {num_labels:,} labels",
    "a device has",
    "a smaller encoder, fewer free vectors, or more devices along config.mesh.fsdp",
  )
  if not steps:
    return
  batch = f"the similarities in a batch, config.train.batch_size={config.train.batch_size} x as many labels,"
  pairs = float(config.train.batch_size) ** 2
  _check(pairs, _machine_memory(), batch, "the machine has", "a smaller batch")  # Which labels are positives.
  of_device = _SIMILARITIES * _FLOAT32 * pairs / sharding.row_devices(mesh)
  _check(of_device, device, batch, "a device has", "a smaller batch, or more devices")
  _check(
    _activation_bytes(config, mesh),
    device,
    f"a chunk of config.train.chunk_rows={config.train.chunk_rows} rows of "
    f"config.train.row_length={config.train.row_length} tokens",
    "a device has",
    "fewer or shorter rows, or more devices",
  )


def not_enough_memory(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """Returns the function so that a lack of memory raises an `InputError`, which says what needs less."""

  @functools.wraps(function)
  def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with _lack_of_memory_in_one_line():
      return function(*args, **kwargs)

  return run


@contextlib.contextmanager
def _lack_of_memory_in_one_line() -> Iterator[None]:
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
      raise
    raise InputError(
      f"there is not enough memory ({' '.join(text.split())[:200]}); lower config.train.chunk_rows or "
      "config.train.batch_size, use more devices, or a smaller encoder; python -m vixml_jax.aot_compile computes what "
      "a config needs"
    ) from error


def _num_steps(config: ConfigDict, num_queries: int) -> int:
  return config.train.epochs * steps_per_epoch(num_queries, config.train.batch_size)


def _check(needed: float, available: float, what: str, where: str, advice: str) -> None:
  if needed > available:
    raise InputError(
      f"{what} need at least {needed / _GIB:,.1f} GiB, and {where} {available / _GIB:,.1f} GiB; use {advice}"
    )


def _machine_memory() -> float:
  return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")


def _state_bytes(config: ConfigDict, model: ModelDefinition, mesh: Mesh, num_queries: int, num_labels: int) -> float:
  """Returns the bytes on each device of the parameters, the moments of the trained ones, bank and centroids."""
  trained, frozen = model.split(abstract_params(model, mesh))
  tables = abstract_model_part(model, num_labels, mesh)
  del tables["params"]
  bank = float(num_queries) * model.embed_dim * np.dtype(config.train.bank_dtype).itemsize / sharding.row_devices(mesh)
  copies = _COPIES if config.train.epochs else 1
  classifiers = 0.0
  if config.train.epochs and config.train.classifier_weight:
    classifiers = _COPIES * _FLOAT32 * float(num_labels) * (model.embed_dim + 1) / sharding.row_devices(mesh)
  return copies * _bytes(trained) + _bytes(frozen) + _bytes(tables) + bank + classifiers


def _bytes(tree: object) -> float:
  return float(sum(map(sharding.bytes_a_device, jax.tree.leaves(tree))))


def _activation_bytes(config: ConfigDict, mesh: Mesh) -> float:
  """Returns bytes that a device needs for one layer: three vectors a token, and its scores with the whole row."""
  encoder, train, call = config.encoder, config.train, attention_call(config, mesh)
  token = np.dtype(encoder.dtype).itemsize * (2 * encoder.embed_dim + encoder.mlp_dim / mesh.shape["tensor"])
  if choose(encoder.attention, call) == REFERENCE:
    token += _FLOAT32 * encoder.num_heads * train.row_length / mesh.shape["tensor"]
  return float(train.chunk_rows) * train.row_length * token / sharding.row_devices(mesh)
