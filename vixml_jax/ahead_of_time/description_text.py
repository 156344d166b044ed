"""A description of a run as text, with the parameters as a tree of modules, and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

from vixml_jax.ahead_of_time.description import DescribedArray, Description
from vixml_jax.run.provenance import provenance_lines
from vixml_jax.text_columns import aligned

_MB = 1e6


def description_text(description: Description) -> str:
  """Returns the description as text."""
  config, mesh = description.config, description.mesh
  parts = description.bytes_a_device()
  head = ["module or parameter", "shape", "logical axes", "shared by", "dtype", "parameters", "MB a device", ""]
  return "\n".join(
    [
      f"{config.name}: {config.encoder.architecture} encoder, method {config.method}, "
      f"{description.count():,} parameters, {description.count(trained=True):,} of them trained",
      f"mesh {' x '.join(map(str, mesh.values()))} ({' x '.join(mesh)}); {description.size.train:,} training queries, "
      f"{description.size.labels:,} labels",
      "",
      *aligned([head, *_tree(description.parameters)]),
      "",
      *aligned(
        [
          ["part of the run", "MB a device"],
          *([name, _megabytes(size)] for name, size in parts.items()),
          ["all of it, without batches and activations", _megabytes(sum(parts.values()))],
        ]
      ),
      "",
      "What initializes the run:",
      *(f"{number:3}. {line}" for number, line in enumerate(description.initial_values, 1)),
      *(line for start in description.provenance for line in _start(start)),
    ]
  )


def _start(start: Mapping[str, Any]) -> list[str]:
  """Returns the lines about an entry of a run's provenance."""
  return ["", "Provenance:", *(f"  {name}: {value}" for name, value in provenance_lines(start))]


def _tree(arrays: Sequence[DescribedArray], depth: int = 0) -> Iterator[list[str]]:
  """Yields a row for each module with its sums, and under it a row for each of its parameters."""
  for name, group in itertools.groupby(arrays, key=lambda array: array.path.split("/")[depth]):
    members = list(group)
    indented = "  " * depth + name
    count, size = sum(array.size for array in members), sum(array.bytes_a_device for array in members)
    fates = {"trained" if array.trained else "frozen" for array in members}
    last = [f"{count:,}", _megabytes(size), " and ".join(sorted(fates))]
    if len(members) == 1 and len(members[0].path.split("/")) == depth + 1:
      (array,) = members
      shape = " x ".join(map(str, array.shape))
      shares = ", ".join(share or "-" for share in array.mesh_axes)
      yield [indented, shape, ", ".join(array.axes), shares, array.dtype, *last]
    else:
      yield [f"{indented}/", "", "", "", "", *last]
      yield from _tree(members, depth + 1)


def _megabytes(size: int) -> str:
  return f"{size / _MB:,.1f}"


def description_json(description: Description) -> dict[str, Any]:
  """Returns the same as JSON; sizes are in bytes."""
  return {
    "name": description.config.name,
    "encoder": description.config.encoder.architecture,
    "method": description.config.method,
    "mesh": description.mesh,
    "data": dataclasses.asdict(description.size),
    "parameters": [dataclasses.asdict(array) | {"parameters": array.size} for array in description.parameters],
    "num_parameters": description.count(),
    "num_trained": description.count(trained=True),
    "bytes_a_device": description.bytes_a_device(),
    "initial_values": list(description.initial_values),
    "provenance": list(description.provenance),
  }
