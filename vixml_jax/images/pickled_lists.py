"""Reads an `.npy` file with lists of integers, which is a pickle, without unpickling it.

A pickle is a program. This module reads its instructions one by one and executes only those that build integers, lists
and numpy arrays of them. It never imports or calls anything that the file names, and refuses a file with any other
instruction or name.
"""

from collections.abc import Callable, Sequence
import itertools
import math
import os
from pathlib import Path
import pickletools  # nosec B403 - it lists the instructions of a pickle and runs none.
import re
from typing import Any, BinaryIO

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged

# The names that a pickled array uses, in the modules of numpy 1 and 2. None of them is imported.
_NAMES = {
  "numpy": {"dtype", "ndarray"},
  "numpy.core.multiarray": {"_reconstruct", "scalar"},
  "numpy._core.multiarray": {"_reconstruct", "scalar"},
  "numpy.core.numeric": {"_frombuffer"},
  "numpy._core.numeric": {"_frombuffer"},
}
_INTEGERS = re.compile(r"[iu][1248]")
_LITERALS = (
  "BININT",
  "BININT1",
  "BININT2",
  "LONG1",
  "LONG4",
  "BINUNICODE",
  "SHORT_BINUNICODE",
  "BINBYTES",
  "SHORT_BINBYTES",
  "BYTEARRAY8",
)


def read_lists(path: str | os.PathLike[str]) -> Ragged:
  """Reads the rows of an array of integers or of lists of integers.

  Args:
    path: `.npy` file with a one-dimensional object array whose entries are integers or lists (tuples, arrays) of
      integers; or with a two-dimensional array, which numpy makes of lists with equal lengths.

  Returns:
    The integers of each row, int64.

  Raises:
    InputError: The file cannot be read, or contains anything else.
  """
  path = Path(path)
  try:
    with path.open("rb") as file:
      shape, dtype = _read_header(file)
      if not dtype.hasobject:
        file.seek(0)
        return _rows(shape, np.lib.format.read_array(file, allow_pickle=False).ravel().tolist())
      array = _Reader().run(file.read())
    if not isinstance(array, _Array) or array.shape != shape:
      raise _Refused("its array does not have the shape of its header")
    return _rows(shape, array.entries)
  except _Refused as error:
    raise InputError(
      f"{path}: {error}; a map has lists of integers and nothing else: download it again, and do not open this file "
      "with numpy"
    ) from error
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror or error}); download it again") from error
  # Errors of a malformed program: too few values on the stack, values of other types, and so on.
  except (ValueError, EOFError, OverflowError, LookupError, TypeError, AttributeError) as error:
    raise InputError(f"{path}: not an .npy file with lists of integers ({error}); download it again") from error


class _Refused(Exception):
  """Raised for an instruction, a name or a value that lists of integers do not need."""


class _Dtype:
  """Substitute for `numpy.dtype(code)`."""

  def __init__(self, code: str, *_: Any):
    self._code, self._order = code, "|"

  def build(self, state: tuple[Any, ...]) -> None:
    """Sets the byte order, as `numpy.dtype.__setstate__` does."""
    self._order = state[1]

  def numbers(self, data: bytes) -> list[int]:
    """Returns the integers that bytes encode."""
    if not _INTEGERS.fullmatch(self._code) or self._order not in ("<", ">", "|", "="):
      raise _Refused(f"it has numbers of type {self._code}")
    return np.frombuffer(data, np.dtype(self._order + self._code)).tolist()


class _Array:
  """Substitute for a numpy array: its shape and a flat list of its entries."""

  def __init__(self, *_: Any):
    self.shape: tuple[int, ...] = ()
    self.entries: list[Any] = []

  def build(self, state: tuple[Any, ...]) -> None:
    """Sets shape and entries, as `numpy.ndarray.__setstate__` does."""
    _, self.shape, dtype, by_columns, entries = state
    if by_columns:
      raise _Refused("an array in it is stored by columns")
    self.entries = entries if isinstance(entries, list) else dtype.numbers(entries)


class _Reader:
  """A stack machine for the pickle instructions that arrays of lists of integers need."""

  def __init__(self) -> None:
    self._stack: list[Any] = []
    self._marks: list[int] = []
    self._memo: dict[int, Any] = {}
    push = self._stack.append
    self._do: dict[str, Callable[[Any], None]] = {
      **dict.fromkeys(_LITERALS, push),
      **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
      **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._remember),
      **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda number: push(self._memo[number])),
      "MEMOIZE": lambda _: self._remember(len(self._memo)),
      "NONE": lambda _: push(None),
      "NEWTRUE": lambda _: push(True),
      "NEWFALSE": lambda _: push(False),
      "EMPTY_LIST": lambda _: push([]),
      "EMPTY_TUPLE": lambda _: push(()),
      "MARK": lambda _: self._marks.append(len(self._stack)),
      "APPEND": lambda _: self._extend(self._take(1)),
      "APPENDS": lambda _: self._extend(self._take_to_mark()),
      "TUPLE": lambda _: push(tuple(self._take_to_mark())),
      "TUPLE1": lambda _: push(tuple(self._take(1))),
      "TUPLE2": lambda _: push(tuple(self._take(2))),
      "TUPLE3": lambda _: push(tuple(self._take(3))),
      "GLOBAL": lambda name: self._name(*name.split(" ", 1)),
      "STACK_GLOBAL": lambda _: self._name(*self._take(2)),
      "REDUCE": lambda _: self._reduce(*self._take(2)),
      "BUILD": lambda _: self._build(*self._take(1)),
    }

  def run(self, program: bytes) -> Any:
    """Executes a pickle and returns its value."""
    do = self._do
    for opcode, argument, _ in pickletools.genops(program):
      name = opcode.name
      if name == "STOP":
        break
      if name not in do:
        raise _Refused(f"it has the instruction {name}")
      do[name](argument)
    return self._stack.pop()

  def _remember(self, number: int) -> None:
    self._memo[number] = self._stack[-1]

  def _take(self, count: int) -> list[Any]:
    if count > len(self._stack):
      raise IndexError("its stack is empty")
    taken = self._stack[-count:]
    del self._stack[-count:]
    return taken

  def _take_to_mark(self) -> list[Any]:
    mark = self._marks.pop()
    taken = self._stack[mark:]
    del self._stack[mark:]
    return taken

  def _extend(self, values: list[Any]) -> None:
    if not isinstance(self._stack[-1], list):
      raise _Refused("it appends to a value that is not a list")
    self._stack[-1].extend(values)

  def _name(self, module: str, name: str) -> None:
    if name not in _NAMES.get(module, ()):
      raise _Refused(f"it uses {module}.{name}"[:100])
    self._stack.append(_Name(name))

  def _reduce(self, function: "_Name", arguments: tuple[Any, ...]) -> None:
    if not isinstance(function, _Name) or function.name not in _SUBSTITUTES:
      raise _Refused("it calls a value that is not a function")
    self._stack.append(_SUBSTITUTES[function.name](*arguments))

  def _build(self, state: tuple[Any, ...]) -> None:
    if not isinstance(self._stack[-1], _Array | _Dtype):
      raise _Refused("it sets the state of a value that is not an array")
    self._stack[-1].build(state)


class _Name:
  """An allowed name that the file uses."""

  def __init__(self, name: str):
    self.name = name


def _scalar(dtype: _Dtype, data: bytes) -> int:
  (number,) = dtype.numbers(data)
  return number


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
  array = _Array()
  array.build((1, shape, dtype, order != "C", data))
  return array


# Called where the file calls the numpy function of that name.
_SUBSTITUTES: dict[str, Callable[..., Any]] = {
  "_reconstruct": _Array,
  "dtype": _Dtype,
  "scalar": _scalar,
  "_frombuffer": _from_buffer,
}


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
  """Returns shape and type of the array in an `.npy` file."""
  if np.lib.format.read_magic(file) == (1, 0):
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  else:
    shape, _, dtype = np.lib.format.read_array_header_2_0(file)
  return shape, dtype


def _rows(shape: tuple[int, ...], entries: list[Any]) -> Ragged:
  """Returns the rows of an array with a flat list of entries: integers or, in one dimension, lists of integers."""
  if len(shape) not in (1, 2) or len(entries) != math.prod(shape):
    raise _Refused(f"its array of shape {shape} has {len(entries)} entries")
  if len(shape) == 2:
    lengths, flat = np.full(shape[0], shape[1]), entries
  else:
    lists = [_numbers(entry) for entry in entries]
    lengths, flat = np.array([len(numbers) for numbers in lists], np.int64), list(itertools.chain.from_iterable(lists))
  if not set(map(type, flat)) <= {int}:
    raise _Refused("it has a value that is not an integer")
  return Ragged.of_lengths(np.array(flat, np.int64), lengths)


def _numbers(entry: Any) -> Sequence[Any]:
  if isinstance(entry, _Array):
    return entry.entries
  return entry if isinstance(entry, list | tuple) else [entry]
