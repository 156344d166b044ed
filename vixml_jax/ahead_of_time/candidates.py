"""Lists the ways to run a training step on a machine, with bounds of their time and memory that need no compilation."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import itertools
import logging
import shlex
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from vixml_jax.ahead_of_time.machine import Machine
from vixml_jax.ahead_of_time.plan import Plan, all_mesh_plans, bytes_a_chip, halvings
from vixml_jax.ahead_of_time.programs import run_programs
from vixml_jax.ahead_of_time.roofline import model_flops
from vixml_jax.ahead_of_time.workload import Workload, item_lengths
from vixml_jax.errors import InputError
from vixml_jax.weights import engine

_log = logging.getLogger(__name__)

# Activations that recomputed layers may store, from few to many. An architecture without gate stores the others.
_SAVED = (("query", "key", "value"), ("gate", "query", "key", "value"), ("gate", "up", "query", "key", "value"))


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run the training step.

  Attributes:
    sized: Mesh and chunk size, with the other keys as in the config that was asked for.
    keys: Values of these keys that differ from that config, by dotted key.
    bound: Lower bound of the expected seconds of a step: those of its products, or `sent`.
    sent: Seconds in which the chips exchange what they must.
    memory: Lower bound of the bytes on each chip.
  """

  sized: Plan
  keys: Mapping[str, Any]
  bound: float
  sent: float
  memory: float

  @functools.cached_property
  def plan(self) -> Plan:
    """The step on the machine. The keys change neither its arrays nor its batch."""
    return dataclasses.replace(self.sized, workload=self.sized.workload.with_keys(self.keys))

  @property
  def flags(self) -> str:
    """The flags that select this candidate."""
    return " ".join([self.sized.mesh_plan.flags, *(_flag(key, value) for key, value in self.keys.items())])


def _flag(key: str, value: Any) -> str:
  """Returns the flag of a key of the config, quoted for a shell."""
  text = "(" + "".join(f'"{name}",' for name in value) + ")" if isinstance(value, tuple) else f"{value}"
  return f"--config.{key}={shlex.quote(text)}"


def candidates(workload: Workload, where: Machine) -> list[Candidate]:
  """Returns the candidates that may fit the chips, in the order of the bounds of their times.

  Meshes and chunk sizes are combined with what the backward pass recomputes: the config's own choice, layers that are
  recomputed or not, chunks that run within each layer, and sets of activations that recomputed layers store.

  Args:
    workload: The workload; its batch, optimizer and data are those of every candidate.
    where: The machine.
  """
  found = list(_all(workload, where))
  kept = [each for each in found if each.memory <= where.chip.hbm_bytes]
  _log.info(
    "%d candidates; %d others are left out, because their arrays and the activations that they keep do not fit",
    len(kept),
    len(found) - len(kept),
  )
  return sorted(kept, key=lambda each: (each.bound, each.sent, each.memory))


def _all(workload: Workload, where: Machine) -> Iterator[Candidate]:
  asked = workload.config.train.chunk_rows
  # Chunks that are halved, and doubled until they hold the batch.
  rows = len(workload.batch.items.segments) * asked
  sizes = halvings(asked)
  sizes += itertools.takewhile(lambda size: size <= rows, (asked << i for i in itertools.count(1)))
  resized = {size: workload.with_chunk_rows(size) for size in sizes}  # Each of them packs its batch once.
  for mesh_plan in all_mesh_plans(len(where.devices), sizes):
    sized = resized[mesh_plan.chunk_rows]
    try:
      plan = Plan.of(sized, where, mesh_plan)
    except InputError:  # A size of the model or the batch is not divisible by this mesh.
      continue
    held, train = max(each.held for each in run_programs(plan)), bytes_a_chip(plan.train_arguments)
    for choice in _recomputations(sized.config, int(sized.batch.items.filled.sum())):
      products, sent = _seconds(plan, choice)
      keys = {key: value for key, value in choice.keys.items() if value != _Recomputation.of(sized.config).keys[key]}
      yield Candidate(plan, keys, max(products, sent), sent, max(held, train + _kept_bytes(plan, choice)))


@dataclasses.dataclass(frozen=True)
class _Recomputation:
  """What the backward pass recomputes: `encoder.remat`, `encoder.remat_saved` and `train.chunks_in` of a config."""

  layers: bool
  saved: tuple[str, ...] = ()
  chunks_in: str = "encoder"

  @classmethod
  def of(cls, config: ConfigDict) -> "_Recomputation":
    return cls(config.encoder.remat, tuple(config.encoder.remat_saved), config.train.chunks_in)

  @property
  def keys(self) -> dict[str, Any]:
    return {"encoder.remat": self.layers, "encoder.remat_saved": self.saved, "train.chunks_in": self.chunks_in}


def _recomputations(config: ConfigDict, num_chunks: int) -> Iterator[_Recomputation]:
  """Yields what the backward pass may recompute; the config's own choice first.

  Args:
    config: The whole config.
    num_chunks: Number of chunks of the batch. A single one is the same within layers and around the encoder.
  """
  own, gated = _Recomputation.of(config), config.encoder.architecture == "decoder"
  choices = [own, _Recomputation(not own.layers)]
  if num_chunks > 1 and config.train.remat:
    choices.append(_Recomputation(own.layers, chunks_in="layer"))
  if own.layers:
    saved = [tuple(name for name in names if gated or name != "gate") for names in ((), *_SAVED)]
    choices += [_Recomputation(True, names) for names in saved]
  yield from dict.fromkeys(choices)


def _seconds(plan: Plan, choice: _Recomputation) -> tuple[float, float]:
  """Returns the seconds that a step takes at least: products at the expected rate, and what a chip must send."""
  workload, mesh, chip = plan.workload, plan.mesh_plan, plan.where.chip
  items = workload.batch.items
  lengths = item_lengths(items.segments)
  num_chunks = int(items.filled.sum())
  in_layers = num_chunks > 1 and choice.chunks_in == "layer"
  products = model_flops(workload.model, lengths, train=True)
  if choice.layers or in_layers:
    products += 2 * int(lengths.sum()) * _recomputed_weights(workload, choice)
  if num_chunks > 1 and workload.config.train.remat and not in_layers:
    products += model_flops(workload.model, lengths, train=False)
  # Shards of the layers, forward and backward: those of the other chips come in, and its own is passed on as often.
  sent = 2 * num_chunks * (mesh.fsdp - 1) * _layer_bytes(plan)
  return (
    products / len(plan.where.devices) / (chip.flops * chip.efficiency),
    sent / plan.where.interconnect.ring_bandwidth(mesh.fsdp * mesh.tensor),
  )


def _recomputed_weights(workload: Workload, choice: _Recomputation) -> int:
  """Returns the number of weights whose products are computed again where layers are recomputed.

  Nobody reads the result of a layer's last product again, and products that are saved by name are not computed again.
  """
  kept = {"down", *choice.saved}
  return sum(
    leaf.size
    for name, leaf in _layers(workload).items()
    if name.endswith(("/kernel", "/lora_a", "/lora_b")) and name.split("/")[-2] not in kept
  )


def _layer_bytes(plan: Plan) -> float:
  """Returns the bytes of the encoder's layers on each chip."""
  return bytes_a_chip([tree.get("encoder", {}).get("layers", {}) for tree in (plan.state.params, plan.frozen)])


def _kept_bytes(plan: Plan, choice: _Recomputation) -> float:
  """Returns the bytes of the activations that a chip keeps for the backward pass at least.

  These are the inputs of all layers and, where a layer is not recomputed, the results of its products except the last
  of the attention and the last of all, which no derivative needs.
  """
  config, mesh = plan.workload.config, plan.mesh_plan
  num_chunks, rows, length = plan.workload.batch.items.segments.shape
  in_layers = num_chunks > 1 and choice.chunks_in == "layer"
  chunks = num_chunks if in_layers or not config.train.remat else 1
  tokens = chunks * rows * length / (mesh.data * mesh.fsdp)
  kernels = {name.split("/")[-2]: leaf for name, leaf in _layers(plan.workload).items() if name.endswith("/kernel")}
  depth, width = kernels["query"].shape[:2]
  names: set[str] = set()
  if not in_layers:
    names = set(choice.saved) - {"attention"} if choice.layers else set(kernels) - {"output", "down"}
  others = sum(kernels[name].size / (depth * width) for name in names) / mesh.tensor
  return tokens * depth * (width + others) * np.dtype(config.encoder.dtype).itemsize


def _layers(workload: Workload) -> Mapping[str, Any]:
  """Returns the shapes of the encoder's layers by their names."""
  return engine.flatten_tree(workload.model.shapes["encoder"]["layers"])
