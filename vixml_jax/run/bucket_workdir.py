"""A workdir in a bucket: a command works on a copy in the cache, which is sent after every checkpoint and at the end.

The copy is filled from the bucket when the command starts. What has changed since is sent, in such an order that a kill
at any time leaves the old state or the new one in the bucket: the data of a checkpoint or of a label index before the
file with their hashes, and after that, what was deleted is removed. A record beside the copy says which files the
bucket has. If the bucket cannot be reached for a while, training goes on, and everything is sent later. The copy stays
in the cache, and the next start on this machine continues from it.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import logging
import os
from pathlib import Path
import re
import shutil
import tempfile
import threading
from typing import Any, NamedTuple
import uuid

import jax

from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of, locked, new_file, remove_folder, write_json
from vixml_jax.manifest import MANIFEST
from vixml_jax.remote import MOUNT, Bucket, StoredFile, cache_root, is_remote, persistently
from vixml_jax.run import bucket_use
from vixml_jax.run.bucket_order import copy_in_order, rank_of
from vixml_jax.run.bucket_use import BucketUse, MustStop
from vixml_jax.run.checkpoint_damage import put_back_replaced
from vixml_jax.run.workdir import CHECKPOINTS, CONFIG, EMBEDDINGS, INDEX
from vixml_jax.stages import stage

_WHOLE = (f"{CHECKPOINTS}/", f"{INDEX}/", f"{EMBEDDINGS}/")
"""Folders whose files never change while they are sent. Lines may be appended to the others, such as the log."""
# Files in progress, leftovers of killed processes, locks, and checkpoints that are not whole. They are not copied.
_PASSING = re.compile(
  rf"(^|/)[^/]*(\.incomplete|\.partial|\.lock|\.orbax-checkpoint-tmp[^/]*)(/|$)|^{CHECKPOINTS}/[^/]*\.damaged/"
)
# Steps that are being replaced. Those of the copy are not sent, since the bucket gets its own (`_keep_former`).
_REPLACED = re.compile(rf"^{CHECKPOINTS}/[^/]*\.replaced/")
_STEP_HASHES = re.compile(rf"^({CHECKPOINTS}/\d+/){re.escape(MANIFEST)}$")

_log = logging.getLogger(__name__)


class OpenWorkdir(NamedTuple):
  """A workdir that a command may read and write.

  Attributes:
    folder: Its local folder.
    saved: Function to call when a checkpoint is whole on the disk.
  """

  folder: Path
  saved: Callable[[], object] = lambda: None


@contextlib.contextmanager
def open_workdir(place: str, *, exists: bool = False) -> Iterator[OpenWorkdir]:
  """Opens a workdir for a command that writes it; one in a bucket is sent at the end of the block.

  Args:
    place: Path of the folder, or its URL in a bucket.
    exists: Whether it must be the workdir of a run that was started.

  Raises:
    InputError: The bucket cannot be read or written, another process uses the workdir, or what has changed could not be
      sent.
  """
  if not is_remote(place):
    yield OpenWorkdir(Path(place))
    return
  if jax.process_count() > 1:
    raise InputError(f"--workdir={place}: a bucket serves one process, and this run has several; {MOUNT}")
  bucket = Bucket(place)
  root = cache_root() / "runs" / fingerprint_of(bucket.url)[:32]
  busy = f"{bucket.url}: another process on this machine uses it; wait for its end, or use another --workdir"
  with locked(root / "lock", busy):
    if exists and bucket.size(CONFIG) is None:
      raise InputError(f"{bucket.url}/{CONFIG}: no such file; --workdir must be a folder that vixml_jax.main wrote")
    workdir = BucketWorkdir(bucket, root)
    workdir.begin()
    try:
      yield OpenWorkdir(workdir.folder, workdir.send_checkpoint)
    except BaseException as error:
      workdir.send_rest()
      if isinstance(error, InputError) and not isinstance(error, MustStop) and str(workdir.folder) in str(error):
        raise InputError(str(error).replace(str(workdir.folder), bucket.url)) from error
      raise
    else:
      workdir.send_all()
    finally:
      workdir.end()


class _Entry(NamedTuple):
  """A file that the bucket has.

  Attributes:
    size: Size of the local file when it was copied.
    changed: Time of its last change, in nanoseconds.
    version: Version of the file of the bucket.
  """

  size: int
  changed: int
  version: str


class BucketWorkdir:
  """The local copy of a workdir in a bucket.

  Attributes:
    folder: The local copy.

  Args:
    bucket: The workdir.
    root: Folder for the copy and its record. One process uses it at a time.
  """

  def __init__(self, bucket: Bucket, root: Path):
    name = bucket.url.rpartition("/")[2]
    self.folder = root / ("run" if name in ("", ".", "..") else name)
    self._bucket, self._record_path = bucket, root / "record.json"
    self._cache, self._entries = self._read_record()
    self._use = BucketUse(bucket, self._cache)
    self._sending = threading.Lock()
    self._unsent = False

  def begin(self) -> None:
    """Fills the copy from the bucket.

    Where the bucket and the copy have changed both, the copy is newer if no other one was used for the workdir since;
    otherwise it is set aside.

    Raises:
      InputError: The bucket cannot be read or written, or another process uses the workdir.
    """
    self._use.wait()
    put_back_replaced(self.folder / CHECKPOINTS)  # Its files would be mixed with those of the bucket.
    if self._changed() and not self._use.is_last():
      aside = self.folder.with_name(f"{self.folder.name}.unsent")
      remove_folder(aside)
      self.folder.rename(aside)
      self._entries = {}
      _log.warning(
        "%s: has changes that were never sent to %s, which another machine has changed since; they are kept in %s",
        self.folder,
        self._bucket.url,
        aside,
      )
    self._write_record()
    self._use.begin()
    try:
      self._receive()
      self._put_back()
    except BaseException:
      self.end()
      raise

  def send_checkpoint(self) -> None:
    """Sends what has changed. If the bucket cannot be reached, a warning is logged, and it is sent later.

    Raises:
      MustStop: Another process uses the workdir, or the copy was deleted.
    """
    try:
      self._send()
    except MustStop:
      raise
    except InputError as error:
      self._unsent = True
      _log.warning("%s; the run goes on in %s, which is sent after the next checkpoint", error, self.folder)

  def send_all(self) -> None:
    """Sends what has changed, at the end of a command that has done its work.

    Raises:
      InputError: It could not be sent; the message names the local folder that has it.
    """
    try:
      self._send()
    except MustStop:
      raise
    except InputError as error:
      raise InputError(
        f"{error}; everything is in {self.folder}: start the same command again on this machine to send it, or copy "
        "the folder there"
      ) from error

  def send_rest(self) -> None:
    """Sends what has changed, at the end of a command that failed; a bucket that cannot be reached is logged."""
    try:
      self._send(attempts=lambda write: write())
    except InputError as error:
      if not isinstance(error, MustStop):
        _log.warning("%s; what was written last is in %s only", error, self.folder)

  def end(self) -> None:
    """Says in the bucket that this process uses the workdir no more."""
    self._use.end(forget=not self._entries)

  def _receive(self) -> None:
    """Copies the files that differ from the bucket, and removes those that were removed there."""
    stored, local = self._stored(), self._local()
    own = {name for name, state in local.items() if self._is_changed(name, state)}
    own_steps = tuple(step[1] for name in own if (step := _STEP_HASHES.match(name)))
    wanted = [
      name
      for name, file in stored.items()
      if (name not in local and not name.startswith(own_steps or ("/",)))
      or (name in local and name not in own and self._entries[name].version != file.version)
    ]
    for name in local.keys() - stored.keys() - own:
      (self.folder / name).unlink()
      self._entries.pop(name)
      with contextlib.suppress(OSError):  # It has other files.
        os.removedirs((self.folder / name).parent)
    if not wanted:
      return
    total = sum(stored[name].size for name in wanted)

    def receive(name: str) -> None:
      path = self.folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      with new_file(path) as work:
        self._bucket.get(name, work)
      self._entries[name] = _Entry(*_state(path), stored[name].version)

    with stage(f"copy {total / 2**20:,.0f} MiB of {self._bucket.url} to {self.folder}"):
      try:
        copy_in_order(wanted, receive)
      finally:
        self._write_record()

  def _put_back(self) -> None:
    """Gives steps of the bucket their names back that were about to be replaced; they are sent under these names."""
    checkpoints = self.folder / CHECKPOINTS
    former = [path for path in checkpoints.glob("*.replaced") if not (path.with_suffix("") / MANIFEST).exists()]
    put_back_replaced(checkpoints)
    steps = tuple(f"{CHECKPOINTS}/{path.stem}/" for path in former)
    # Files of both were received at one time, and may have one size.
    self._entries |= {name: _Entry(-1, -1, "") for name in self._entries if name.startswith(steps)}

  def _send(self, attempts: Callable[[Callable[[], object]], object] = persistently) -> None:
    """Sends what has changed.

    Args:
      attempts: Calls a function, perhaps several times, until it raises no InputError.

    Raises:
      MustStop: Another process uses the workdir, or the copy was deleted.
      InputError: The bucket cannot be reached.
    """
    with self._sending:
      changed, local = self._changed(), self._local()
      if CONFIG in self._entries and CONFIG not in local:
        raise MustStop(
          f"{self.folder}: was deleted while it was in use; {self._bucket.url} is as it was sent last: start the same "
          "command again to continue from there"
        )
      steps = (self.folder / CHECKPOINTS).glob("*.replaced")
      unfinished = tuple(f"{CHECKPOINTS}/{path.stem}/" for path in steps)  # The bucket keeps what they replace.
      changed = [name for name in changed if not name.startswith(unfinished)]
      local |= {name: entry[:2] for name, entry in self._entries.items() if name.startswith(unfinished)}
      gone = self._entries.keys() - local.keys()
      if not changed and not gone:
        return
      attempts(self._use.check)
      for name in [name for name in changed if name in self._entries and _STEP_HASHES.match(name)]:
        attempts(functools.partial(self._keep_former, name.removesuffix(MANIFEST)))  # The step was saved again.
      gone = self._entries.keys() - local.keys()
      with stage(f"send {len(changed)} files to {self._bucket.url}", logged=False):
        copy_in_order(changed, lambda name: self._put(name, attempts))
        stored: dict[str, StoredFile] = {}
        attempts(lambda: stored.update(self._stored()))
        for name in stored.keys() & self._entries.keys() & set(changed):
          self._entries[name] = self._entries[name]._replace(version=stored[name].version)
        self._write_record()
        copy_in_order(gone, lambda name: attempts(lambda: self._bucket.remove(name)), lambda name: 2 - rank_of(name))
      for name in gone:
        del self._entries[name]
      self._write_record()
      if self._unsent:
        _log.info("%s has everything again", self._bucket.url)
      self._unsent = False

  def _put(self, name: str, attempts: Callable[[Callable[[], object]], object]) -> None:
    """Sends a file, unless it has been deleted meanwhile."""
    path = self.folder / name
    with contextlib.suppress(FileNotFoundError):
      state = _state(path)
      if name.startswith(_WHOLE):
        attempts(lambda: self._bucket.put(path, name))
      else:
        with tempfile.TemporaryDirectory(prefix="vixml-") as folder:
          copy = Path(shutil.copyfile(path, Path(folder) / "copy"))
          attempts(lambda: self._bucket.put(copy, name))
      self._entries[name] = _Entry(*state, "")  # Its version is known when all files are listed.

  def _keep_former(self, step: str) -> None:
    """Renames a step in the bucket that is about to be replaced, as `Checkpointer.save` does in its folder."""
    names = [name for name in self._entries if name.startswith(step)]
    former = {name: f"{step.rstrip('/')}.replaced/{name.removeprefix(step)}" for name in names}
    copy_in_order(names, lambda name: self._bucket.copy(name, former[name]))
    self._bucket.remove(step + MANIFEST)
    self._entries |= {former[name]: self._entries[name] for name in names}  # They are removed with what is gone.
    del self._entries[step + MANIFEST]
    self._write_record()

  def _stored(self) -> dict[str, StoredFile]:
    files = self._bucket.files()
    return {name: file for name, file in files.items() if name != bucket_use.NAME and not _PASSING.search(name)}

  def _local(self) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of the files of the copy that belong into the bucket."""
    found = {}
    for path in self.folder.rglob("*"):
      name = path.relative_to(self.folder).as_posix()
      if not _PASSING.search(name) and not _REPLACED.search(name) and path.is_file():
        with contextlib.suppress(FileNotFoundError):
          found[name] = _state(path)
    return found

  def _changed(self) -> list[str]:
    """Returns the files that differ from those that the bucket has."""
    return [name for name, state in self._local().items() if self._is_changed(name, state)]

  def _is_changed(self, name: str, state: tuple[int, int]) -> bool:
    return name not in self._entries or self._entries[name][:2] != state

  def _read_record(self) -> tuple[str, dict[str, _Entry]]:
    """Returns the id of the copy and the files that the bucket has; a new id without a record or without the copy."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      record: dict[str, Any] = json.loads(self._record_path.read_text(encoding="utf-8"))
      if self.folder.is_dir() or not record["files"]:
        return record["cache"], {name: _Entry(*entry) for name, entry in record["files"].items()}
    return uuid.uuid4().hex, {}

  def _write_record(self) -> None:
    write_json(self._record_path, {"cache": self._cache, "files": self._entries})


def _state(path: Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_size, found.st_mtime_ns
