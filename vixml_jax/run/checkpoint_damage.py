"""Finds the newest checkpoint that is whole: its files have the sha256 that were stored when it was saved."""

from collections.abc import Sequence
import json
import logging
from pathlib import Path
import shutil

import jax
from jax.experimental import multihost_utils
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import remove_folder, sync_folder
from vixml_jax.manifest import MANIFEST, Damage, FileHashes, find_damage, read_manifest

HASHED = "has_sha256"
"""Key of a step's metadata: the step is complete only with its hashes. Steps of earlier versions lack the key."""
_REPLACED = ".replaced"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax writes it.

_log = logging.getLogger(__name__)


def newest_whole_step(directory: Path, steps: Sequence[int], items: Sequence[str] = ()) -> int | None:
  """Returns the newest step whose files have the hashes that were stored with them, and logs which newer ones do not.

  A step of a version that stored no hashes counts as whole, and the log says that it was not checked. With several
  processes, each reads a share of the files, and all return the same step.

  Args:
    directory: folder of all checkpoints.
    steps: the steps in it.
    items: items of which the files are read; none for all.

  Returns:
    None if no step was saved whole.

  Raises:
    InputError: steps were saved whole, and all are damaged now; the message names a file of the newest one.
  """
  log = _log.warning if jax.process_index() == 0 else _log.debug
  damaged = []
  for step in sorted(steps, reverse=True):
    folder = directory / str(step)
    if _is_unfinished(folder):
      log("%s: is not used, since its process ended before it was saved whole", folder)
      continue
    damage = _find_damage(folder, items)
    if damage is None:
      if damaged:
        log("%s; step %d is used instead", "; ".join(damaged), step)
      return step
    damaged.append(f"{folder / damage.name}: is damaged ({damage.reason})")
  if not damaged:
    return None
  raise InputError(f"{damaged[0]}, and no other checkpoint is whole; restore the file, or use another --workdir")


def set_aside(step: Path, name: Path) -> None:
  """Renames the folder of a step; the former one of this name is removed. All are when the step has been saved again.

  Args:
    step: the folder.
    name: `aside(step)` if it is not whole, `replaced(step)` if it is.
  """
  shutil.rmtree(name, ignore_errors=True)
  step.rename(name)
  sync_folder(step.parent)


def aside(step: Path) -> Path:
  """Returns the new name of a step that is not whole."""
  return step.with_name(f"{step.name}.damaged")


def replaced(step: Path) -> Path:
  """Returns the name of a whole step while the same step is saved again."""
  return step.with_name(f"{step.name}{_REPLACED}")


def put_back_replaced(directory: Path) -> None:
  """Gives steps their names back whose process ended before it had saved them again."""
  for former in directory.glob(f"*{_REPLACED}"):
    step = former.with_suffix("")
    if (step / MANIFEST).exists():
      remove_folder(former)
      continue
    if step.exists():
      set_aside(step, aside(step))
    former.rename(step)
    sync_folder(directory)


def _is_unfinished(step: Path) -> bool:
  """Returns whether a step lacks the hashes that are written last."""
  if (step / MANIFEST).exists():
    return False
  try:
    metadata = json.loads((step / _METADATA).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return True
  if (metadata.get("custom_metadata") or {}).get(HASHED):
    return True
  if jax.process_index() == 0:
    _log.info("%s: was saved by a version that stored no hashes, so it is not checked", step)
  return False


def _find_damage(step: Path, items: Sequence[str]) -> Damage | None:
  """Returns the first damaged file of a step; None if it is whole, or of a version that stored no hashes."""
  if not (step / MANIFEST).exists():
    return None
  try:
    files = read_manifest(step)
  except InputError:
    return Damage(MANIFEST, "it cannot be read, or was changed")
  if items:
    files = {name: entry for name, entry in files.items() if name.split("/")[0] in items or "/" not in name}
  return _find_shared(step, files) if jax.process_count() > 1 else find_damage(step, files, contents=True)


def _find_shared(step: Path, files: FileHashes) -> Damage | None:
  """Returns a damaged file that any process has found; each reads a share of the files."""
  names = sorted(files, key=lambda name: files[name]["size"])
  own = names[jax.process_index() :: jax.process_count()]
  damage = find_damage(step, {name: files[name] for name in own}, contents=True)
  found = multihost_utils.process_allgather(np.int32(-1 if damage is None else names.index(damage.name)))
  first = int(found.max())
  if first < 0:
    return None
  return damage if damage and damage.name == names[first] else Damage(names[first], "another process has found it")
