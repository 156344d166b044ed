"""Prepared sets in a bucket: they are copied to the cache where they are missing there, and sent when they were made.

A set is a folder with the hashes of its files (`manifest`). It is sent before its hashes are, so that a folder of the
bucket without them is no set, and is sent again.
"""

from collections.abc import Iterator
import contextlib
import functools
import os
from pathlib import Path

import jax
import tensorflow_datasets as tfds

from vixml_jax.datasets.prepared import prepare
from vixml_jax.errors import InputError
from vixml_jax.files import locked, new_folder, remove_folder
from vixml_jax.manifest import MANIFEST, check_folder
from vixml_jax.remote import MOUNT, Bucket, is_remote, local_data_dir, local_table, persistently
from vixml_jax.stages import stage

_SENT = ".in_bucket"
"""End of the name of the empty file beside a copied set. A set with it that the bucket lacks was deleted there."""


@contextlib.contextmanager
def shared_sets(data_dir: str | os.PathLike[str], name: str) -> Iterator[Path]:
  """Yields the local folder of prepared data; sets of a bucket are copied to it before, and new ones sent after.

  Args:
    data_dir: Folder for all prepared data, or its URL in a bucket.
    name: Path of a folder in it; only the sets in this folder are copied and sent.

  Raises:
    InputError: The bucket cannot be reached; it has no set and cannot be written; a set is damaged; or this is one of
      several processes.
  """
  if not is_remote(data_dir):
    yield Path(data_dir)
    return
  url = str(data_dir).rstrip("/")
  if jax.process_count() > 1:
    raise InputError(f"data_dir={url}: a bucket serves one process, and this run has several; {MOUNT}")
  local, bucket = local_data_dir(url), Bucket(f"{url}/{name}")
  with locked(local / f"{name}.bucket.lock"):
    if not _receive(bucket, local / name):
      bucket.check_writable()
    try:
      yield local
    except InputError as error:
      raise InputError(str(error).replace(str(local), url)) from error
    _send(bucket, local / name)


def prepare_shared(
  name: str, raw_dir: str | os.PathLike[str] | None, data_dir: str | os.PathLike[str], allow_empty_filter: bool = False
) -> tfds.core.DatasetBuilder:
  """Builds a data set from its raw files if that has not been done, and opens it; both folders may be in buckets.

  Args:
    name: As for `prepared.prepare`, like the others.
    raw_dir: Folder of the raw files, or its URL, from which it is copied to the cache once for each of its versions.
    data_dir: Folder for all prepared data, or its URL.
    allow_empty_filter: Accept a filter file without pairs.

  Raises:
    InputError: As for `prepared.prepare` and `shared_sets`.
  """
  with shared_sets(data_dir, name) as local:
    return prepare(name, local_raw_folder(raw_dir, data_dir), local, allow_empty_filter)


def local_raw_folder(
  raw_dir: str | os.PathLike[str] | None, data_dir: str | os.PathLike[str]
) -> str | os.PathLike[str] | None:
  """Returns the path of raw files; those in a bucket are copied to the cache.

  Raises:
    InputError: There are none, or the bucket cannot be reached.
  """
  if not raw_dir or not is_remote(raw_dir):
    return raw_dir
  parent, _, name = str(raw_dir).rstrip("/").rpartition("/")
  if parent == str(data_dir).rstrip("/"):  # A converted table, which is a set of `data_dir`.
    with shared_sets(parent, name) as local:
      return local / name
  return local_table(str(raw_dir))


def _receive(bucket: Bucket, folder: Path) -> bool:
  """Copies the sets of a bucket to a folder, removes those that were deleted there, and returns whether it has any."""
  sizes = bucket.sizes()
  sets = {path.removesuffix(MANIFEST): path for path in sizes if path.split("/")[-1] == MANIFEST}
  for local in _local_sets(folder):
    path = _within(local, folder)
    if path not in sets and _mark(local).exists():
      remove_folder(local)
      _mark(local).unlink()
  for path, manifest in sets.items():
    target = folder / path
    if (target / MANIFEST).exists() and (target / MANIFEST).read_bytes() == bucket.read(manifest):
      _mark(target).touch()
      continue
    remove_folder(target)
    names = [name for name in sizes if name.startswith(path)]
    with (
      stage(f"copy {sum(sizes[name] for name in names) / 2**20:,.0f} MiB of {bucket.url}/{path} to {target}"),
      new_folder(target) as work,
    ):
      for name in names:
        bucket.get(name, work / name.removeprefix(path))
      try:
        check_folder(work, f"delete {bucket.url}/{path} to make it again", contents=True)
      except InputError as error:
        raise InputError(str(error).replace(str(work), f"{bucket.url}/{path}".rstrip("/"))) from error
    _mark(target).touch()
  return bool(sets)


def _send(bucket: Bucket, folder: Path) -> None:
  """Sends the sets that the bucket lacks, with the lists of problems beside them."""
  for local in _local_sets(folder):
    if _mark(local).exists():
      continue
    files = sorted(path for path in local.rglob("*") if path.is_file() and path != local / MANIFEST)
    lists = [] if local == folder else sorted(local.parent.glob("*.jsonl"))
    with stage(f"send {len(files)} files of {local} to {bucket.url}"):
      for path in [*files, *lists, local / MANIFEST]:
        name = path.relative_to(folder).as_posix()
        persistently(functools.partial(bucket.put, path, name))
    _mark(local).touch()


def _local_sets(folder: Path) -> list[Path]:
  return [path.parent for path in sorted(folder.rglob(MANIFEST)) if not path.parent.name.endswith(".incomplete")]


def _within(local: Path, folder: Path) -> str:
  """Returns the path of a set as `_receive` has it: empty, or with a slash at the end."""
  return "" if local == folder else f"{local.relative_to(folder).as_posix()}/"


def _mark(local: Path) -> Path:
  return local.with_name(local.name + _SENT)
