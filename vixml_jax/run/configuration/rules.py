"""Kinds of rules for the value of a key: which values it accepts, and the words for them."""

from collections.abc import Sequence
import dataclasses
import itertools
import math
import re
from typing import Any, Protocol

from vixml_jax.files import path_problem


class ValueRule(Protocol):
  """A rule for one value. Values may come from JSON, so a list stands for a tuple and an int for a float."""

  @property
  def allowed(self) -> str:
    """What is accepted, as it follows "must be"."""

  def accepts(self, value: Any) -> bool:
    """Returns whether a value of any type is accepted."""


@dataclasses.dataclass(frozen=True)
class Whole:
  """Whole numbers from `low` to `high`, and those of `also`.

  Attributes:
    low: Smallest number.
    high: Largest number.
    also: Numbers outside of the range, each with its meaning.
    power_of_two: Whether numbers in the range must be powers of two.
    even: Whether numbers in the range must be even.
  """

  low: int
  high: int
  also: tuple[tuple[int, str], ...] = ()
  power_of_two: bool = False
  even: bool = False

  @property
  def allowed(self) -> str:
    """See `ValueRule`."""
    kind = "a power of two" if self.power_of_two else "an even number" if self.even else "a whole number"
    return f"{kind} from {self.low:,} to {self.high:,}" + "".join(
      f", or {number} {words}" for number, words in self.also
    )

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    if type(value) is not int:  # True is an int as well.
      return False
    if any(value == number for number, _ in self.also):
      return True
    fits = not (self.power_of_two and value & (value - 1)) and not (self.even and value % 2)
    return self.low <= value <= self.high and fits


@dataclasses.dataclass(frozen=True)
class Number:
  """Finite numbers from `low` to `high`, and those of `also`.

  Attributes:
    low: Smallest number.
    high: Largest number.
    above_low: Whether `low` itself is excluded.
    below_high: Whether `high` itself is excluded.
    also: Numbers outside of the range.
  """

  low: float
  high: float
  above_low: bool = False
  below_high: bool = False
  also: tuple[float, ...] = ()

  @property
  def allowed(self) -> str:
    """See `ValueRule`."""
    bounds = f"from {self.low:g} to {self.high:g}"
    if self.above_low or self.below_high:
      low, high = "above" if self.above_low else "at least", "below" if self.below_high else "at most"
      bounds = f"{low} {self.low:g} and {high} {self.high:g}"
    return f"a number {bounds}" + "".join(f", or {number:g}" for number in self.also)

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    if type(value) not in (int, float) or not (isinstance(value, int) or math.isfinite(value)):
      return False
    above = value > self.low if self.above_low else value >= self.low
    below = value < self.high if self.below_high else value <= self.high
    return (above and below) or value in self.also


@dataclasses.dataclass(frozen=True)
class Flag:
  """True and False."""

  allowed: str = "True or False"

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of several words, of which one may be empty."""

  names: tuple[str, ...]

  @property
  def allowed(self) -> str:
    """See `ValueRule`."""
    empty = "empty, or " if "" in self.names else ""
    return f"{empty}one of {', '.join(filter(None, self.names))}"

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    return isinstance(value, str) and value in self.names


@dataclasses.dataclass(frozen=True)
class Text:
  """Texts of `least` to `most` characters that are not all spaces, without NUL and without halves of characters.

  Attributes:
    least: Smallest number of characters; 0 for a text that may be empty.
    most: Largest number of characters.
  """

  least: int
  most: int

  @property
  def allowed(self) -> str:
    """See `ValueRule`."""
    return f"{'' if self.least else 'empty, or '}a text of {max(self.least, 1)} to {self.most:,} characters of Unicode"

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    if not isinstance(value, str) or len(value) > self.most or (self.least and not value.strip()):
      return False
    return not re.search("[\0\ud800-\udfff]", value)


@dataclasses.dataclass(frozen=True)
class Place:
  """Paths of files and folders, and names on the hub; see `files.path_problem`.

  Attributes:
    empty: Whether it may be empty.
    inner: Whether it may contain slashes; without, it is the name of a file.
  """

  empty: bool = False
  inner: bool = True

  @property
  def allowed(self) -> str:
    """See `ValueRule`."""
    start = "empty, or " if self.empty else ""
    return start + (
      "a path that can be written, without ~ at its start" if self.inner else "a name that a file can have"
    )

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    if not isinstance(value, str):
      return False
    if not value:
      return self.empty
    if not self.inner and ("/" in value or value in (".", "..")):
      return False
    return bool(value.strip()) and path_problem(value) is None


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Texts that match a regular expression as a whole, and empty ones.

  Attributes:
    pattern: The regular expression.
    allowed: What it accepts, as it follows "must be".
    ascending: Whether the numbers in its groups must ascend.
  """

  pattern: str
  allowed: str
  ascending: bool = False

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    if not isinstance(value, str):
      return False
    found = re.fullmatch(self.pattern, value)
    return not value or (
      found is not None and (not self.ascending or _ascend([int(group) for group in found.groups()]))
    )


@dataclasses.dataclass(frozen=True)
class Several:
  """Lists of `least` to `most` values that another rule accepts.

  Attributes:
    item: Rule of each value.
    least: Smallest number of values.
    most: Largest number of values.
    once: Whether each value may occur once only.
    descending: Whether values must descend.
  """

  item: ValueRule
  least: int = 0
  most: int = 100
  once: bool = False
  descending: bool = False

  @property
  def allowed(self) -> str:
    """See `ValueRule`."""
    number = f"{self.least or 1} to {self.most}" if self.most > 1 else "1"
    order = ", in descending order" if self.descending else ", each once" if self.once else ""
    return f"{'' if self.least else 'empty, or '}a list of {number} values{order}, each {self.item.allowed}"

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
      return False
    if not all(self.item.accepts(each) for each in value):
      return False
    if self.descending and not _ascend(value[::-1], strictly=True):
      return False
    return not self.once or len(set(value)) == len(value)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """No values, or the one or four of `rope_scaling` in models/decoder.py."""

  number: Number = dataclasses.field(default_factory=lambda: Number(0, 1e9, above_low=True))
  allowed: str = (
    "empty, or the number factor, or the four numbers factor, low_freq_factor, high_freq_factor (above the second) and "
    "original_max_position, each above 0 and at most 1e+09"
  )

  def accepts(self, value: Any) -> bool:
    """See `ValueRule`."""
    if not isinstance(value, list | tuple):
      return False
    if len(value) == 0:
      return True
    if len(value) not in (1, 4) or not all(map(self.number.accepts, value)):
      return False
    return len(value) == 1 or value[1] < value[2]


def _ascend(values: Sequence[Any], strictly: bool = False) -> bool:
  return all(a < b or (a == b and not strictly) for a, b in itertools.pairwise(values))
