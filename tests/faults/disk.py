"""A layer over Python's file operations that counts them, and fails, tears or ends the process at the n-th.

It sees what Python code does below one folder: opening for writing, writing, fsync, renaming, removing, making folders
and links. It does not see what C++ code writes (TensorStore, array_record, pyarrow), except that such a file exists.

`power_cut` leaves of the folder what a power cut may leave: contents of files that were not synced are lost, and so may
be names in folders that were not synced. Three outcomes are distinguished, since a file system may keep either:

  synced  only what was synced
  names   all names, but of each file only the contents that were synced
  mixed   for each folder and file one of both, drawn at random
"""

import builtins
from collections.abc import Iterator
import contextlib
import errno
import io
import os
from pathlib import Path
import random
import shutil
import threading

import numpy.lib._format_impl as numpy_format

FAULTS = ("kill", "tear", "ENOSPC", "EIO", "synced", "names", "mixed")
"""What can happen at an operation: the process ends before it or in the middle of a write, an error, a power cut."""
POWER_CUTS = ("synced", "names", "mixed")
_NEEDS_ROOM = ("open", "write", "fsync", "mkdir", "link")

_open, _os_open, _close = builtins.open, os.open, os.close


class Killed(BaseException):
  """The process has ended: nothing after it may change the disk."""


class Disk:
  """The file operations below a folder.

  Attributes:
    operations: Kind and path of each operation, in order.
  """

  def __init__(self, root: Path, fault: str | None = None, at: int = 0, unsynced: tuple[Path, ...] = ()):
    """Takes the contents of the folder as synced.

    Args:
      root: The folder.
      fault: One of `FAULTS`; None only counts.
      at: Number of the operation at which it happens, from 1.
      unsynced: Folders of files whose contents have not been synced.
    """
    self.operations: list[tuple[str, str]] = []
    self._root, self._fault, self._at = Path(root), fault, at
    self._dead = False
    self._lock = threading.RLock()
    self._random = random.Random(at)
    self._held: list[int] = []  # Open files and folders, so that the system does not use their numbers again.
    self._contents: dict[int, bytes] = {}
    self._names: dict[int, dict[str, int]] = {}
    self._folders: set[int] = set()
    if fault in POWER_CUTS:
      for folder, _, files in os.walk(root):
        self._names[self._number(folder)] = self._listing(folder)
        for path in (Path(folder) / name for name in files):
          lost = any(path.is_relative_to(other) for other in unsynced)
          self._contents[self._number(path)] = b"" if lost else path.read_bytes()

  # --- the operations

  def step(self, kind: str, path: str) -> str | None:
    """Counts an operation. Returns the fault that a write must carry out in part; raises any other fault."""
    with self._lock:
      if self._dead:
        raise Killed
      self.operations.append((kind, path))
      number = len(self.operations)
      if self._fault == "ENOSPC" and number >= self._at and kind in _NEEDS_ROOM:
        if kind == "write" and number == self._at:
          return "ENOSPC"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
      if number != self._at:
        return None
      if self._fault == "EIO":
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
      if self._fault == "tear" and kind == "write":
        return "tear"
      if self._fault not in (None, "ENOSPC"):
        self._dead = True
        raise Killed
      return None

  def write(self, file: "_File", data: memoryview) -> int:
    """Writes, or not, or half of it."""
    if self._dead:
      return len(data)  # What a buffer still had is lost.
    fault = self.step("write", str(file.name))
    if fault is None:
      return io.FileIO.write(file, data)
    half = bytes(data)[: len(data) // 2]
    io.FileIO.write(file, half)
    if fault == "ENOSPC":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self._dead = True
    raise Killed

  def covers(self, path: str) -> bool:
    """Returns whether a path is below the folder."""
    return path == str(self._root) or path.startswith(f"{self._root}/")

  def synced(self, descriptor: int) -> None:
    """Stores what has reached the disk by an fsync."""
    if self._fault not in POWER_CUTS:
      return
    path, number = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_ino
    if os.path.isdir(path):
      self._names[number] = self._listing(path)
    else:
      with _open(f"/proc/self/fd/{descriptor}", "rb") as file:
        self._contents[number] = file.read()

  def hold(self, path: str) -> None:
    """Keeps the number of a file or folder from being used again, since its name is about to go."""
    if self._fault in POWER_CUTS and os.path.lexists(path):
      self._held.append(_os_open(path, os.O_RDONLY))

  # --- the power cut

  def power_cut(self) -> None:
    """Leaves of the folder what a power cut may leave."""
    whole = self._tree(self._root, keep=lambda: self._fault == "names" or self._mixed())
    for path in list(self._root.iterdir()):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write_tree(self._root, whole)
    for descriptor in self._held:
      _close(descriptor)
    self._held = []

  def _mixed(self) -> bool:
    return self._fault == "mixed" and self._random.random() < 0.5

  def _tree(self, folder: Path, keep) -> dict:
    """Returns names and contents of a folder after the power cut."""
    current = {}
    for parent, _, files in os.walk(folder):
      current[self._number(parent)] = self._listing(parent)
      for name in files:
        current[self._number(Path(parent) / name)] = (Path(parent) / name).read_bytes()

    def read(number: int) -> dict | bytes:
      now = current.get(number)
      if number not in self._folders:
        return now if now is not None and self._mixed() else self._contents.get(number, b"")
      names = now if now is not None and keep() else self._names.get(number, {})
      return {name: read(inner) for name, inner in names.items()}

    return read(self._number(folder))

  @staticmethod
  def _number(path: str | Path) -> int:
    return os.stat(path).st_ino

  def _listing(self, folder: str) -> dict[str, int]:
    found = {path.name: path for path in Path(folder).iterdir()}
    numbers = {name: self._number(path) for name, path in sorted(found.items())}
    self._folders |= {self._number(folder), *(numbers[name] for name, path in found.items() if path.is_dir())}
    return numbers


class _File(io.FileIO):
  """A file that is open for writing below the folder."""

  def __init__(self, disk: Disk, path: str, mode: str):
    self._disk = disk
    super().__init__(path, mode)

  def write(self, data) -> int:
    return self._disk.write(self, memoryview(data).cast("B"))


def _write_tree(folder: Path, tree: dict) -> None:
  for name, value in tree.items():
    if isinstance(value, dict):
      (folder / name).mkdir()
      _write_tree(folder / name, value)
    else:
      (folder / name).write_bytes(value)


@contextlib.contextmanager
def installed(disk: Disk) -> Iterator[None]:
  """Lets Python's file operations go through a layer."""
  saved = []

  def replace(owner, name, function):
    saved.append((owner, name, getattr(owner, name)))
    setattr(owner, name, function)

  def path_of(path, dir_fd=None) -> str:
    if isinstance(path, int):
      return os.readlink(f"/proc/self/fd/{path}")
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.normpath(f"{folder}/{os.fsdecode(path)}" if not os.fsdecode(path).startswith("/") else path)

  def wrapped(kind, real, victim):
    def operation(path, *args, **kwargs):
      where = path_of(path, kwargs.get("dir_fd"))
      if disk.covers(where):
        disk.step(kind, where)
        if victim is not None:
          disk.hold(path_of(args[0]) if victim == "target" else where)
      return real(path, *args, **kwargs)

    return operation

  def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
    where = None if isinstance(file, int) else path_of(file)
    if where is None or not set(mode) & set("wax+") or not disk.covers(where):
      return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    disk.step("open", where)
    raw = _File(disk, where, mode.replace("b", "").replace("t", ""))
    buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

  def fsync(descriptor):
    where = path_of(descriptor)
    if not disk.covers(where):
      return real_fsync(descriptor)
    disk.step("fsync", where)
    return disk.synced(descriptor)

  real_fsync = os.fsync
  replace(builtins, "open", opened)
  replace(io, "open", opened)
  replace(os, "fsync", fsync)
  for kind, name, victim in (
    ("rename", "rename", "target"),
    ("rename", "replace", "target"),
    ("unlink", "unlink", "path"),
    ("unlink", "remove", "path"),
    ("rmdir", "rmdir", "path"),
    ("mkdir", "mkdir", None),
    ("link", "link", None),
  ):
    replace(os, name, wrapped(kind, getattr(os, name), victim))
  # numpy and shutil would otherwise write past Python's file objects.
  replace(numpy_format, "isfileobj", lambda file: False)
  replace(shutil, "_USE_CP_SENDFILE", False)
  try:
    yield
  finally:
    for owner, name, function in reversed(saved):
      setattr(owner, name, function)
