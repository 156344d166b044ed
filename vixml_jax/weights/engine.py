"""Matches a checkpoint to a table of weights, applies and inverts it; refuses whatever does not fit exactly."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple, Protocol

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.weights.tables import Rule, Table

_SHOWN = 10  # Names that an error lists before it only counts.


class TensorSource(Protocol):
  """A checkpoint whose tensors are read one at a time."""

  name: str

  def names(self) -> Sequence[str]:
    """Names of all tensors; one that stands there twice is listed twice."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it."""

  def read(self, name: str) -> np.ndarray:
    """The tensor."""


class Match(NamedTuple):
  """A tensor of a checkpoint and the parameter, or the layer of one, that it is.

  Attributes:
    ours: path of the parameter.
    layer: index in the parameter's leading dimension; None where the tensor is the whole parameter.
    layout: how the tensor's dimensions become ours (without the layers).
    name: of the tensor, in the checkpoint.
  """

  ours: str
  layer: int | None
  layout: "Layout"
  name: str


def match(table: Table, source: TensorSource, abstract: Mapping[str, Any]) -> Iterator[Match]:
  """Checks a checkpoint against parameters like `abstract`, then yields what goes where; reads no tensor.

  Args:
    table: of the checkpoint's architecture.
    source: the checkpoint.
    abstract: nested dict of arrays or ShapeDtypeStructs, for the shapes wanted.

  Returns:
    One match for each tensor that a rule reads: the parameters in the table's order, each one's layers in theirs.

  Raises:
    InputError: tensors that no rule reads (unmapped), parameters that nothing fills (unfilled),
      something filled or named twice (duplicate), or a wrong shape. Lists all of them.
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
  """Reads a checkpoint into parameters like `abstract` on the host; `placement.place` fills devices.

  Args:
    table: of the checkpoint's architecture.
    source: the checkpoint.
    abstract: nested dict of arrays or ShapeDtypeStructs, for the shapes and dtypes wanted.

  Returns:
    Nested dict of numpy arrays, layers stacked in front.

  Raises:
    InputError: the checkpoint does not fit; see `match`.
  """
  matches = match(table, source, abstract)
  filled = {path: np.empty(value.shape, value.dtype) for path, value in flatten_tree(abstract).items()}
  for found in matches:
    part = source.read(found.name)[found.layout.part]
    filled[found.ours][... if found.layer is None else found.layer] = found.layout.to_ours(part)
  return unflatten_tree(filled)


class Inverse:
  """Our parameters, to be read like a checkpoint: one tensor at a time, by its name there.

  Args:
    table: of the checkpoint's architecture.
    params: nested dict of arrays, or of anything else that has a `shape` and gives an array for `[layer]` and `[...]`.

  Attributes:
    name: of the whole, for messages.

  Raises:
    InputError: the table and the parameters do not cover each other.
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
    """Names of all tensors."""
    return list(self._parts)

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it."""
    return self._parts[name][0][2].theirs

  def read(self, name: str) -> np.ndarray:
    """The tensor; contiguous, since safetensors writes an array's memory whatever its strides."""
    found = [
      layout.to_theirs(np.asarray(leaf[... if layer is None else layer])) for leaf, layer, layout in self._parts[name]
    ]
    return np.ascontiguousarray(np.concatenate(found) if len(found) > 1 else found[0])


def invert(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """From our parameters to the tensors of a checkpoint, by name; the inverse of `apply`.

  Raises:
    InputError: the table and the parameters do not cover each other.
  """
  inverse = Inverse(table, params)
  return {name: inverse.read(name) for name in inverse.names()}


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{"a": {"b": x}}` -> `{"a/b": x}`."""
  flat = {}
  for key, value in tree.items():
    path = f"{prefix}{key}"
    flat.update(flatten_tree(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
  return flat


def unflatten_tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten_tree`."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def targets(rule: Rule, shape: Sequence[int]) -> Iterator[tuple[str, int | None, "Layout"]]:
  """Each tensor of a rule for a parameter of known shape.

  Yields:
    The tensor's name in the table's terms, its layer (None if it is the whole parameter), its layout.
  """
  if "{layer}" not in rule.theirs:
    yield rule.theirs, None, Layout.of(rule, shape)
    return
  layout = Layout.of(rule, shape[1:])
  for layer in range(shape[0]):
    yield rule.theirs.replace("{layer}", str(layer)), layer, layout


def original_names(table: Table, source: TensorSource) -> tuple[dict[str, str], list[str]]:
  """Of each name in the table's terms the name in the checkpoint, and the names found twice."""
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
  """Raises InputError unless rules, tensors and parameters match one to one, shapes included."""
  readers: dict[tuple[str, tuple[int, int]], int] = {}
  fillers: dict[str, int] = {}
  missing, misshapen = [], set()
  for rule in table.rules:
    fillers[rule.ours] = fillers.get(rule.ours, 0) + 1
    if rule.ours not in wanted:
      missing.append(f"{rule.ours} (which the model lacks)")
      continue
    for name, _, layout in targets(rule, wanted[rule.ours].shape):
      readers[name, rule.part] = readers.get((name, rule.part), 0) + 1
      if name not in theirs:
        missing.append(f"{rule.ours} (from {name})")
        continue
      shape = source.shape(theirs[name])
      if shape != layout.theirs:
        misshapen.add(f"{theirs[name]} is {list(shape)}, wanted {list(layout.theirs)}")
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
    f"{source.name}: weights that do not fit a {table.name} model of this size",
    [
      _listed("unmapped", "+", unmapped),
      _listed("unfilled", "-", missing + [name for name in wanted if name not in fillers]),
      _listed("duplicate", "", twice),
      _listed("wrong shape", "", misshapen),
    ],
  )


def _listed(kind: str, sign: str, names: Iterable[str]) -> str:
  names = sorted(names)
  if not names:
    return ""
  shown = ", ".join(sign + name for name in names[:_SHOWN])
  return f"{len(names)} {kind}: {shown}{', ...' if len(names) > _SHOWN else ''}"


def _raise_any(subject: str, problems: list[str]) -> None:
  found = [problem for problem in problems if problem]
  if found:
    raise InputError(f"{subject}: {'; '.join(found)}")


@dataclasses.dataclass(frozen=True)
class Layout:
  """A rule's layout for a parameter of known shape.

  Attributes:
    theirs: shape of the tensor.
    start: where in the tensor's first dimension the part begins that holds the parameter.
    shape: of that part.
    split: shape of the part once its joined dimensions are taken apart.
    order: for each of our dimensions, which one of `split` it is.
    outer: for each of their dimensions, which one of ours varies slowest in it; None for a size of one.
  """

  theirs: tuple[int, ...]
  start: int
  shape: tuple[int, ...]
  split: tuple[int, ...]
  order: tuple[int, ...]
  outer: tuple[int | None, ...]

  @classmethod
  def of(cls, rule: Rule, shape: Sequence[int]) -> "Layout":
    """The layout of a rule for a parameter (or a layer of one) of `shape`."""
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
    """Of the tensor's first dimension, what holds the parameter."""
    return slice(self.start, self.start + self.shape[0])

  def to_ours(self, part: Any) -> Any:
    """The parameter, from the part of a tensor (numpy or JAX) that holds it."""
    return part.reshape(self.split).transpose(self.order)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    return array.transpose(np.argsort(self.order)).reshape(self.shape)
