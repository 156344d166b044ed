"""Converts checkpoints to parameters and back by a table of rules; anything that does not fit exactly is an error."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple, Protocol

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.weights.tables import Rule, Table

_MAX_LAYERS = 1_000  # More are not looked for one by one, unless there are as many tensors.
_SHOWN = 10  # Maximum number of names that an error lists.


class TensorSource(Protocol):
  """A checkpoint whose tensors are read one at a time.

  Attributes:
    name: Name of the checkpoint, for messages.
  """

  name: str

  def names(self) -> Sequence[str]:
    """Returns the names of all tensors. A name that occurs twice is listed twice."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading it."""

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor."""


class Match(NamedTuple):
  """A tensor of a checkpoint and the parameter, or the layer of a parameter, that it fills.

  Attributes:
    ours: Path of the parameter.
    layer: Index in the parameter's leading dimension; None if the tensor fills the whole parameter.
    layout: Mapping from the tensor's dimensions to those of the parameter, without the leading dimension of layers.
    name: Name of the tensor in the checkpoint.
  """

  ours: str
  layer: int | None
  layout: "Layout"
  name: str


def match(table: Table, source: TensorSource, abstract: Mapping[str, Any]) -> Iterator[Match]:
  """Checks that a checkpoint fits parameters, and returns which tensor fills which parameter; reads no tensor.

  Args:
    table: Table of the checkpoint's architecture.
    source: The checkpoint.
    abstract: Nested dict of arrays or ShapeDtypeStructs with the shapes of the parameters.

  Returns:
    One match for each tensor that a rule reads, in the order of the table and of the layers.

  Raises:
    InputError: If a tensor is read by no rule (unmapped), a parameter is filled by no tensor (unfilled), either is
      matched more than once (duplicate), or a shape is wrong. The message lists them.
  """
  wanted = flatten_tree(abstract)
  theirs, twice = original_names(table, source)
  _check(table, source, theirs, twice, wanted)
  return (
    Match(rule.ours, layer, layout, theirs[name])
    for rule in table.rules
    for name, layer, layout in targets(rule, wanted[rule.ours].shape)
  )


def apply(table: Table, source: TensorSource, abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Reads a checkpoint into parameters on the host; `placement.place` reads it into sharded arrays.

  Args:
    table: Table of the checkpoint's architecture.
    source: The checkpoint.
    abstract: Nested dict of arrays or ShapeDtypeStructs with the shapes and dtypes of the parameters.

  Returns:
    Nested dict of numpy arrays. Layers are stacked along the first dimension.

  Raises:
    InputError: If the checkpoint does not fit; see `match`.
  """
  matches = match(table, source, abstract)
  filled = {path: np.empty(value.shape, value.dtype) for path, value in flatten_tree(abstract).items()}
  for found in matches:
    part = source.read(found.name)[found.layout.part]
    filled[found.ours][... if found.layer is None else found.layer] = found.layout.to_ours(part)
  return unflatten_tree(filled)


class Inverse:
  """Our parameters as a `TensorSource`: the tensors of a checkpoint are converted one at a time.

  Args:
    table: Table of the checkpoint's architecture.
    params: Nested dict of arrays, or of objects that have a `shape` and return arrays for `[layer]` and `[...]`.

  Attributes:
    name: Name of the checkpoint, for messages.

  Raises:
    InputError: If a parameter has no rule, or a rule has no parameter.
  """

  def __init__(self, table: Table, params: Mapping[str, Any]):
    self.name = f"parameters for a {table.name} checkpoint"
    ours = flatten_tree(params)
    ruled = [rule.ours for rule in table.rules]
    _raise_any(
      self.name,
      [
        _listed("unmapped", "+", set(ours) - set(ruled)),
        _listed("unfilled", "-", set(ruled) - set(ours)),
        _listed("duplicate", "", {name for name in ruled if ruled.count(name) > 1}),
      ],
    )
    self._parts: dict[str, list[Any]] = {}
    for rule in table.rules:
      number, count = rule.part
      leaf = ours[rule.ours]
      for name, layer, layout in targets(rule, leaf.shape):
        self._parts.setdefault(name, [None] * count)[number] = leaf, layer, layout

  def names(self) -> Sequence[str]:
    """Returns the names of all tensors."""
    return list(self._parts)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without converting it."""
    return self._parts[name][0][2].theirs

  def read(self, name: str) -> np.ndarray:
    """Converts a tensor. It is contiguous, because safetensors writes the memory of an array and ignores strides."""
    found = [
      layout.to_theirs(np.asarray(leaf[... if layer is None else layer])) for leaf, layer, layout in self._parts[name]
    ]
    return np.ascontiguousarray(np.concatenate(found) if len(found) > 1 else found[0])


def invert(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the tensors of a checkpoint, by name, for our parameters; the inverse of `apply`.

  Raises:
    InputError: If a parameter has no rule, or a rule has no parameter.
  """
  inverse = Inverse(table, params)
  return {name: inverse.read(name) for name in inverse.names()}


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns a flat dict of a nested one, with the keys joined by slashes.

  >>> flatten_tree({"layers": {"up": {"kernel": 1}}, "bias": 2})
  {'layers/up/kernel': 1, 'bias': 2}
  """
  flat = {}
  for key, value in tree.items():
    path = f"{prefix}{key}"
    flat.update(flatten_tree(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
  return flat


def unflatten_tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict of a flat one; the inverse of `flatten_tree`."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def targets(rule: Rule, shape: Sequence[int]) -> Iterator[tuple[str, int | None, "Layout"]]:
  """Yields the tensors of a rule for a parameter of a given shape.

  Yields:
    The name of the tensor as the table writes it, the layer that it fills (None for the whole parameter), and its
    layout.
  """
  if not rule.per_layer:
    yield rule.theirs, None, Layout.of(rule, shape)
    return
  layout = Layout.of(rule, shape[1:])
  for layer in range(shape[0]):
    yield rule.theirs.replace("{layer}", str(layer)), layer, layout


def original_names(table: Table, source: TensorSource) -> tuple[dict[str, str], list[str]]:
  """Returns a map from each name, as the table writes it, to the name in the checkpoint, and the duplicate names."""
  original: dict[str, str] = {}
  twice = []
  for name in source.names():
    plain = name
    for prefix in table.prefixes:
      plain = plain.removeprefix(prefix)
    for old, new in table.renamed.items():
      plain = re.sub(old, new, plain)
    if plain in original:
      twice.append(name)
    original[plain] = name
  return original, twice


def _check(
  table: Table, source: TensorSource, theirs: Mapping[str, str], twice: list[str], wanted: Mapping[str, Any]
) -> None:
  """Raises InputError unless rules, tensors and parameters match one to one with equal shapes."""
  readers: dict[tuple[str, tuple[int, int]], int] = {}
  fillers: dict[str, int] = {}
  missing, misshapen = [], set()
  for rule in table.rules:
    fillers[rule.ours] = fillers.get(rule.ours, 0) + 1
    if rule.ours not in wanted:
      missing.append(f"{rule.ours} (not in the model)")
      continue
    layers = wanted[rule.ours].shape[0] if rule.per_layer else 1
    if layers > max(_MAX_LAYERS, len(theirs)):  # A config can ask for any number of layers.
      missing.append(f"{rule.ours} ({layers} layers, but there are {len(theirs)} tensors)")
      continue
    for name, _, layout in targets(rule, wanted[rule.ours].shape):
      readers[name, rule.part] = readers.get((name, rule.part), 0) + 1
      if name not in theirs:
        missing.append(f"{rule.ours} (from {name})")
        continue
      shape = source.shape(theirs[name])
      if shape != layout.theirs:
        misshapen.add(f"{theirs[name]} is {list(shape)!s:.80}, expected {list(layout.theirs)}")
  ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignored) or r"(?!)")
  read = {name for name, _ in readers}
  unmapped = [name for plain, name in theirs.items() if plain not in read and not ignored.fullmatch(plain)]
  unmapped += {
    f"{name} (part {number + 1} of {count})"
    for name, (_, count) in readers
    for number in range(count)
    if (name, (number, count)) not in readers
  }
  twice = twice + [name for (name, _), count in readers.items() if count > 1]
  twice += [name for name, count in fillers.items() if count > 1]
  _raise_any(
    f"{source.name}: the weights do not fit a {table.name} model of this size",
    [
      _listed("unmapped", "+", unmapped),
      _listed("unfilled", "-", missing + [name for name in wanted if name not in fillers]),
      _listed("duplicate", "", twice),
      _listed("wrong shape", "", misshapen),
    ],
  )


def _listed(kind: str, sign: str, names: Iterable[str]) -> str:
  """Returns one part of a message, such as `2 unmapped: +a, +b`; "" if there are no names."""
  names = sorted(names)
  if not names:
    return ""
  shown = ", ".join(sign + " ".join(name.split())[:200] for name in names[:_SHOWN])
  return f"{len(names)} {kind}: {shown}{', ...' if len(names) > _SHOWN else ''}"


def _raise_any(subject: str, problems: list[str]) -> None:
  found = [problem for problem in problems if problem]
  if found:
    raise InputError(f"{subject}: {'; '.join(found)}")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Layout of a rule for a parameter of a given shape.

  Attributes:
    theirs: Shape of the tensor.
    start: Index in the tensor's first dimension at which the part with the parameter begins.
    shape: Shape of that part.
    split: Shape of the part after its joined dimensions are split.
    order: For each dimension of the parameter, its index in `split`.
    outer: For each dimension of the tensor, the dimension of the parameter that varies slowest in it; None for a
      dimension of size one.
  """

  theirs: tuple[int, ...]
  start: int
  shape: tuple[int, ...]
  split: tuple[int, ...]
  order: tuple[int, ...]
  outer: tuple[int | None, ...]

  @classmethod
  def of(cls, rule: Rule, shape: Sequence[int]) -> "Layout":
    """Returns the layout of a rule for a parameter, or a layer of one, of this shape.

    Raises:
      ValueError: If the rule's layout does not have one letter per dimension.
    """
    letters = " ".join(f"_{i}" for i in range(len(shape)))
    theirs, ours = (side.strip() for side in (rule.layout or f"{letters} -> {letters}").split("->"))
    groups = [
      [letter for letter in group.strip("()").split() if letter != "1"]
      for group in re.findall(r"\([^)]*\)|\S+", theirs)
    ]
    split = [letter for group in groups for letter in group]
    if sorted(split) != sorted(ours.split()) or len(split) != len(shape):
      raise ValueError(f"layout {rule.layout!r} does not fit a parameter of shape {tuple(shape)}")
    sizes = dict(zip(ours.split(), shape, strict=True))
    first, *rest = (math.prod(sizes[letter] for letter in group) for group in groups)
    number, count = rule.part
    return cls(
      theirs=(first * count, *rest),
      start=first * number,
      shape=(first, *rest),
      split=tuple(sizes[letter] for letter in split),
      order=tuple(split.index(letter) for letter in ours.split()),
      outer=tuple(ours.split().index(group[0]) if group else None for group in groups),
    )

  @property
  def part(self) -> slice:
    """Slice of the tensor's first dimension that holds the parameter."""
    return slice(self.start, self.start + self.shape[0])

  def to_ours(self, part: Any) -> Any:
    """Converts the part of a tensor (numpy or JAX) that holds the parameter to the parameter."""
    return part.reshape(self.split).transpose(self.order)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Converts a parameter to its part of the tensor; the inverse of `to_ours`."""
    return array.transpose(np.argsort(self.order)).reshape(self.shape)
