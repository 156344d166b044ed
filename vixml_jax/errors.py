"""Exceptions that users see as one line without a traceback: bad input, and a run that was asked to stop."""

from collections.abc import Sequence
import reprlib

_SHOWN_NAMES, _SHOWN_CHARS = 20, 60
_MOST_SHOWN = 100


class InputError(ValueError):
  """Bad input that the user can correct: a file, a line, a key or a row.

  The message names what is wrong and what to do. Entry points print it on one line of stderr and exit with status 1.
  Any other exception is a bug and keeps its traceback.
  """


class Preempted(BaseException):
  """The process received SIGTERM and must end; the message says what was saved, and how to continue.

  Like `KeyboardInterrupt` it is no `Exception`, so that no library takes it for an error of its own. Entry points print
  the message and exit with 143.
  """


class StopTraining(Exception):
  """Ends training early: the model is then evaluated and saved as if all epochs had ended.

  A callback raises it in `on_step` or `on_evaluation`. The run is finished: the same call evaluates it again and does
  not train any further.
  """


def install_command(extra: str) -> str:
  """Returns the command that installs the packages of an extra, in a clone and where the package is installed.

  >>> install_command("scann")
  "pip install 'vixml-jax[scann]'"
  """
  return f"pip install 'vixml-jax[{extra}]'"


def listed(names: Sequence[str], mark: str = ", ") -> str:
  """Returns names from a file for a message, in quotes: the first twenty, of each the first characters.

  >>> listed(["a", "b" * 80])
  "'a', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb..."

  Args:
    names: Names of columns or keys, of any length.
    mark: What separates them.
  """
  quoted = map(repr, names[:_SHOWN_NAMES])
  shown = [name if len(name) <= _SHOWN_CHARS else name[: _SHOWN_CHARS - 3] + "..." for name in quoted]
  return mark.join(shown) + (f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else "")


def shown(value: object) -> str:
  """Returns a value as an error message shows it: one line of at most 100 characters.

  >>> shown(("title", 1.0)), shown(10**5000)
  ("('title', 1.0)", 'a number of 16610 bits')
  """
  text = " ".join(_Shortened().repr(value).split("\n"))
  return text if len(text) <= _MOST_SHOWN else f"{text[:60]}...{text[63 - _MOST_SHOWN :]}"


class _Shortened(reprlib.Repr):
  def __init__(self) -> None:
    super().__init__()
    self.maxlevel, self.maxtuple, self.maxlist, self.maxdict = 3, 8, 8, 4
    self.maxstring = self.maxlong = self.maxother = _MOST_SHOWN

  def repr_int(self, value: int, level: int) -> str:
    bits = value.bit_length()  # Python refuses to print numbers of more than 4,300 digits.
    return f"a number of {bits} bits" if bits > 256 else super().repr_int(value, level)
