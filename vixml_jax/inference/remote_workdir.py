"""A trained workdir in a bucket: the files that inference and exports need are copied to the cache and checked.

What is copied is named by the files that hold the hashes of all others: the manifest of the checkpoint, the description
of the label index, and small files. So each state of a workdir is copied once to a machine, and never changes.
"""

import hashlib
import json
from pathlib import Path

from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of
from vixml_jax.manifest import MANIFEST, cached_folder, find_damage, read_manifest
from vixml_jax.remote import Bucket, cache_root, is_remote
from vixml_jax.run.workdir import CHECKPOINTS, CONFIG, EVALUATION, FINAL_METRICS, INDEX, INFERENCE_INFO, TOKENIZER
from vixml_jax.search import snapshots
from vixml_jax.stages import stage

_NOT_NEEDED = ("training", "mining")
"""Items of a checkpoint that only training reads."""
_SMALL_FILES = (CONFIG, INFERENCE_INFO, EVALUATION, FINAL_METRICS)  # The last two are for the card of an export.


def local_workdir(place: str) -> Path:
  """Returns the path of a workdir; of a remote one, a copy in the cache, for reading.

  Args:
    place: Path of a workdir, or its URL in a bucket.

  Raises:
    InputError: The bucket cannot be reached, has no whole workdir, or what arrives differs from its hashes.
  """
  if not is_remote(place):
    return Path(place)
  bucket = Bucket(place)
  sizes = bucket.sizes()
  if CONFIG not in sizes:
    raise InputError(f"{bucket.url}/{CONFIG}: no such file; --workdir must be a folder that vixml_jax.main wrote")
  names = _needed(bucket, set(sizes))
  hashes = {name: hashlib.sha256(bucket.read(name)).hexdigest() for name in names if _holds_hashes(name)}
  folder = cache_root() / "workdirs" / fingerprint_of([bucket.url, hashes])[:32]

  def copy(work: Path) -> None:
    with stage(f"copy {sum(sizes[name] for name in names) / 2**20:,.0f} MiB of {bucket.url} to {folder}"):
      for name in names:
        bucket.get(name, work / name)
    try:
      damage = _damage(work)
    except InputError as error:  # A file that holds hashes is damaged, or was replaced meanwhile.
      damage = str(error).partition(";")[0]
    if damage:
      raise InputError(f"{damage.replace(str(work), bucket.url)}; start again, or copy the workdir there again")

  cached_folder(folder, copy)
  return folder


def _needed(bucket: Bucket, names: set[str]) -> list[str]:
  """Returns the files of a workdir that inference and exports read, with its newest checkpoint."""
  places = [Path(name).parts for name in names]
  steps = [place[1] for place in places if len(place) == 3 and (place[0], place[2]) == (CHECKPOINTS, MANIFEST)]
  numbers = [int(step) for step in steps if step.isdigit()]
  if not numbers:
    raise InputError(f"{bucket.url}/{CHECKPOINTS}: has no checkpoint with {MANIFEST}; copy the whole workdir there")
  step = f"{CHECKPOINTS}/{max(numbers)}/"
  index = f"{INDEX}/{snapshots.CURRENT}"
  current = bucket.read(index).decode(errors="replace").split()[:1] if index in names else []
  folders = [f"{TOKENIZER}/", *(f"{INDEX}/{name}/" for name in current)]
  return sorted(
    name
    for name in names
    if name in (*_SMALL_FILES, index)
    or name.startswith(tuple(folders))
    or (name.startswith(step) and name.removeprefix(step).split("/")[0] not in _NOT_NEEDED)
  )


def _holds_hashes(name: str) -> bool:
  return name in _SMALL_FILES or name.rsplit("/", 1)[-1] in (MANIFEST, snapshots.CURRENT, snapshots.INDEX)


def _damage(work: Path) -> str | None:
  """Returns what differs from the hashes in a copy. Loading compares them again, but the copy would be kept until then.

  Raises:
    InputError: A file that holds hashes is damaged.
  """
  folders = []
  for path in (work / CHECKPOINTS).iterdir():
    files = read_manifest(path)
    folders.append((path, {name: entry for name, entry in files.items() if name.split("/")[0] not in _NOT_NEEDED}))
  if (work / INDEX).exists():
    snapshot = snapshots.read_current(work / INDEX)
    folders.append((snapshot.path, snapshot.info["files"]))
  if (work / INFERENCE_INFO).exists():
    tokenizer = json.loads((work / INFERENCE_INFO).read_text(encoding="utf-8"))["tokenizer_sha256"]
    sizes = {name: (work / TOKENIZER / name).stat().st_size for name in tokenizer if (work / TOKENIZER / name).exists()}
    folders.append(
      (work / TOKENIZER, {name: {"size": sizes.get(name, 0), "sha256": sha256} for name, sha256 in tokenizer.items()})
    )
  for folder, files in folders:
    if damage := find_damage(folder, files, contents=True):
      return f"{folder / damage.name}: is damaged ({damage.reason})"
  return None
