"""Reads arrays of a checkpoint with Orbax; the host needs memory for little more than the arrays themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from vixml_jax import sharding
from vixml_jax.errors import InputError

_Result = TypeVar("_Result")


def restore_items(directory: Path, step: int, items: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Restores items in two parts each, of which one is the largest array, and joins their dictionaries.

  Reading an array needs memory for a second copy of it. The largest arrays are therefore read first and one at a time,
  while little else is in memory.

  Args:
    directory: folder of all checkpoints.
    step: the checkpoint's step.
    items: shapes and shardings to restore into, by item and by name.

  Raises:
    InputError: an item does not fit the shapes, or is damaged.
  """
  parts = []
  for item, abstract in items.items():
    sizes = {name: _largest_shard(tree) for name, tree in abstract.items()}
    largest = max(sizes, key=sizes.__getitem__)
    rest = [name for name in sizes if name != largest]
    parts += [(sizes[largest], item, [largest]), (max((sizes[name] for name in rest), default=0), item, rest)]
  restored = {}
  for _, item, names in sorted(parts, key=lambda part: part[0], reverse=True):
    skipped = {name: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree) for name, tree in items[item].items()}
    wanted = skipped | {name: items[item][name] for name in names}
    found = restore_item(directory, step, item, wanted)
    restored |= {name: found[name] for name in names}
  return restored


def restore_item(directory: Path, step: int, name: str, abstract: Any, partial: bool = False) -> Any:
  """Restores the arrays of an item; the host has memory for the largest shard beside the arrays themselves.

  Args:
    directory: folder of all checkpoints.
    step: the checkpoint's step.
    name: name of the item.
    abstract: shapes and shardings to restore into; `ocp.PLACEHOLDER` for an array that is not read.
    partial: whether the checkpoint may have arrays that are not asked for.

  Raises:
    InputError: the item does not fit the shapes, or is damaged.
  """
  how = ocp.args.PyTreeRestore(
    abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=partial
  )

  def read() -> Any:
    # Orbax counts in GB, and refuses a shard that is larger than the limit.
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_largest_shard(abstract) // 10**9 + 1)
    with ocp.Checkpointer(handler) as checkpointer:
      restored = checkpointer.restore(directory.absolute() / str(step) / name, args=how)
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
      # Orbax returns what it does not find as it was asked for.
      if not isinstance(leaf, jax.Array) and leaf is not ocp.PLACEHOLDER:
        raise KeyError(f"it has no array {jax.tree_util.keystr(path)}")
    return jax.block_until_ready(restored)  # Until then, the copies on the host stay in memory.

  return restoring(directory, read)


def _largest_shard(abstract: Any) -> int:
  """Returns the bytes of the largest array of one device."""
  leaves = (leaf for leaf in jax.tree.leaves(abstract) if leaf is not ocp.PLACEHOLDER)
  return max(map(sharding.bytes_a_device, leaves), default=0)


def restoring(directory: Path, read: Callable[[], _Result]) -> _Result:
  """Returns what Orbax reads.

  Args:
    directory: folder of all checkpoints.
    read: calls Orbax.

  Raises:
    InputError: Orbax cannot read it.
  """
  try:
    return read()
  except Exception as error:
    # Orbax raises a plain Exception where the file of an array is missing or cut off.
    if not isinstance(error, ValueError | KeyError | OSError) and type(error) is not Exception:
      raise
    first_line = str(error).strip().split("\n")[0]
    raise InputError(
      f"{directory}: its checkpoint does not fit this config or is damaged ({first_line}); use the config that wrote "
      "it, or another --workdir"
    ) from error
