"""Copies what inference needs from a workdir to a folder of its own, which is a workdir without a training state."""

import os
from pathlib import Path
import shutil
import tempfile

from vixml_jax.errors import InputError
from vixml_jax.files import new_folder
from vixml_jax.manifest import MANIFEST, read_manifest, write_hashes
from vixml_jax.remote import Bucket, is_remote, persistently
from vixml_jax.run.bucket_order import copy_in_order
from vixml_jax.run.workdir import (
  CHECKPOINTS,
  CONFIG,
  EVALUATION,
  FINAL_METRICS,
  INDEX,
  INFERENCE_INFO,
  REPORT,
  TOKENIZER,
)
from vixml_jax.search import snapshots

# Items of a checkpoint that only training reads: optimizer state, embedding bank and query clusters.
_TRAINING_ITEMS = ("training", "mining")


def save_for_inference(
  workdir: Path, step: int, place: str | os.PathLike[str], *, index: Path | None = None
) -> Path | str:
  """Copies config, checkpoint, tokenizer, label index and results; the copy has no training state.

  Args:
    workdir: Folder of a run, or of an earlier copy.
    step: Step of the checkpoint, whose files have been checked.
    place: Folder to make, or its URL in a bucket.
    index: Folder of the label index; None for that of the workdir.

  Returns:
    The place.

  Raises:
    InputError: The place exists, the disk is full, or the bucket cannot be written.
  """
  if not is_remote(place):
    _save(workdir, step, Path(place), index or workdir / INDEX)
    return Path(place)
  bucket = Bucket(str(place))
  if bucket.files():
    raise InputError(f"{bucket.url}: exists; give the URL of a new folder")
  with tempfile.TemporaryDirectory(prefix="vixml-") as temporary:
    folder = Path(temporary) / "saved"
    _save(workdir, step, folder, index or workdir / INDEX)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    copy_in_order(names, lambda name: persistently(lambda: bucket.put(folder / name, name)))
  return str(place)


def _save(workdir: Path, step: int, target: Path, index: Path) -> None:
  """Copies the files to a folder, which must not exist."""
  if target.exists():
    raise InputError(f"{target}: exists; give the path of a new folder")
  with new_folder(target) as work:
    for name in (CONFIG, INFERENCE_INFO):
      shutil.copyfile(workdir / name, work / name)
    for name in (FINAL_METRICS, EVALUATION, REPORT):
      if (workdir / name).exists():
        shutil.copyfile(workdir / name, work / name)
    shutil.copytree(workdir / TOKENIZER, work / TOKENIZER)
    _copy_checkpoint(workdir / CHECKPOINTS / str(step), work / CHECKPOINTS / str(step))
    current = snapshots.read_current(index)
    shutil.copytree(current.path, work / INDEX / current.path.name)
    (work / INDEX / snapshots.CURRENT).write_text(current.pointer, encoding="utf-8")


def _copy_checkpoint(source: Path, target: Path) -> None:
  """Copies a step without the items of training, and lists in its manifest what is left."""
  shutil.copytree(source, target, ignore=lambda folder, names: set(names) & {*_TRAINING_ITEMS, MANIFEST})
  if (source / MANIFEST).exists():
    files = read_manifest(source)
    write_hashes(target / MANIFEST, {name: files[name] for name in files if name.split("/")[0] not in _TRAINING_ITEMS})
