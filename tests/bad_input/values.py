"""Texts, numbers and JSON values that files have and code does not expect."""

import json
import math
import random
import re

from hypothesis import strategies as st

_ODD = (
  "\0",
  "\ufeff",  # Byte order mark.
  "\u202e",  # Right-to-left override.
  "\u200f",  # Right-to-left mark.
  "\u200b",  # Space without width.
  "\u2028",  # End of a line for `str.splitlines`, not in a file.
  "\x85",
  "\x1b[31m",
  "\r",
  "\n",
  "\t",
  "'",
  '"',
  "\\",
  "{}%s",
  "<script>",
  "e\u0301",
  "\U0001f45f",
)
_SURROGATE = re.compile("[\ud800-\udfff]")

SURROGATES = st.sampled_from(["\ud800", "\udfff", "\udc80", "\udc00\ud800"])
"""Halves of pairs: JSON can spell them, and UTF-8 cannot store them."""
HUGE_INTEGERS = st.integers(4301, 9000).map(lambda digits: "9" * digits)
"""Integers of more digits than Python reads."""
NOT_FINITE = st.sampled_from(["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "1e39", "-1e39"])
"""Numbers in JSON that float32 cannot hold."""


def odd_text(rng, pieces=4):
  """Returns a text that often has odd characters, and no half of a surrogate pair."""
  return "".join(_piece(rng) for _ in range(rng.randrange(pieces + 1)))


def filled_text(rng):
  """Returns a text that is not blank."""
  return odd_text(rng) + rng.choice("abcé") + odd_text(rng)


def _piece(rng):
  kind = rng.randrange(4)
  if kind == 0:
    return rng.choice(_ODD)
  if kind == 1:
    return rng.choice(("red", " shoe", "é", "42", "; ", "|", ","))
  if kind == 2:
    return "".join(rng.choices("abc xyz", k=rng.randrange(9)))
  code = rng.randrange(0x110000 - 0x800)
  return chr(code if code < 0xD800 else code + 0x800)


SEEDS = st.integers(0, 2**63 - 1).map(random.Random)
"""Generators for contents whose details do not matter; hypothesis would take most of the time to draw them."""
TEXTS = SEEDS.map(odd_text)


LONG_TEXTS = st.tuples(st.sampled_from(["x", "word ", "é", "\u202e"]), st.integers(900_000, 1_100_000)).map(
  lambda pair: (pair[0] * pair[1])[: pair[1]]
)
"""Titles of about a megabyte."""


def stored(text):
  """Returns a text as it is stored: each half of a pair becomes three replacement characters."""
  return _SURROGATE.sub("\ufffd" * 3, json.loads(json.dumps(text)))


def json_value(rng, depth=2):
  """Returns a JSON value, NaN and infinity among them."""
  kind = rng.randrange(7 if depth else 5)
  if kind == 0:
    return rng.choice((None, True, False))
  if kind == 1:
    return rng.choice((0, 1, -1, 7, 2**31, 2**63, -(2**70), rng.randrange(10**6), 10**30))
  if kind == 2:
    return rng.choice((0.0, -0.5, 1.5, 1e300, math.nan, math.inf, -math.inf, rng.random()))
  if kind in (3, 4):
    return odd_text(rng)
  items = [json_value(rng, depth - 1) for _ in range(rng.randrange(4))]
  return items if kind == 5 else {odd_text(rng): item for item in items}


JSON_VALUES = SEEDS.map(json_value)


def values_except(*types):
  """JSON values of other types; `bool` is no `int`."""
  return JSON_VALUES.filter(lambda value: type(value) not in types)


def bytes_flipped(draw, content):
  """Returns bytes of which one to three bits differ."""
  flipped = bytearray(content)
  for place in draw(st.lists(st.integers(0, len(content) * 8 - 1), min_size=1, max_size=3, unique=True)):
    flipped[place // 8] ^= 1 << place % 8
  return bytes(flipped)


def cut_off(draw, content):
  """Returns the start of bytes, at least one less."""
  return content[: draw(st.integers(0, len(content) - 1))]
