"""Files of queries in every format: valid ones, and mutations whose effect is known."""

import csv
import dataclasses
import io
import json

from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input import values
from tests.bad_input.campaign import Expected, refused

DIM = 4
"""Size of a feature vector."""
KEYS = ("uid", "title", "content", "images", "allow", "deny", "categories")
LISTS = KEYS[3:]
SUFFIXES = (".jsonl", ".csv", ".parquet")
_STRINGS = pa.list_(pa.string())
_TYPES = {key: pa.string() for key in KEYS[:3]} | dict.fromkeys(LISTS, _STRINGS)
_TYPES["images"] = pa.list_(pa.list_(pa.float32()))


@dataclasses.dataclass
class QueryFileCase:
  """A file of queries.

  Attributes:
    suffix: Suffix of the file.
    rows: A dict for each query, of any of `KEYS`.
    content: The file.
    end: End of the lines.
  """

  suffix: str
  rows: list[dict]
  content: bytes = b""
  end: str = "\n"

  @property
  def name(self):
    return "queries" + self.suffix

  def lines(self):
    if self.suffix == ".jsonl":
      return [json.dumps(row) + self.end for row in self.rows]
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator=self.end, quoting=csv.QUOTE_ALL)
    lines = []
    for row in ([*KEYS], *([_cell(row.get(key)) for key in KEYS] for row in self.rows)):
      sink.seek(0)
      sink.truncate()
      writer.writerow(row)
      lines.append(sink.getvalue())
    return lines

  def write(self, lines=None, start=""):
    if self.suffix == ".parquet":
      self.content = parquet(self.arrow())
    else:
      self.content = (start + "".join(self.lines() if lines is None else lines)).encode(errors="surrogatepass")
    return self

  def arrow(self):
    return pa.table({key: pa.array([row.get(key) for row in self.rows], _TYPES[key]) for key in KEYS})

  def place(self, number):
    if self.suffix == ".parquet":
      return f"{self.name}: row {number}"
    if self.suffix == ".jsonl":
      return f"{self.name}:{number + 1}"
    return f"{self.name}:{1 + sum(line.count(self.end[-1]) for line in self.lines()[: number + 1])}"

  def expected(self):
    return Expected([_expected(row) for row in self.rows])


def parquet(table):
  sink = io.BytesIO()
  pq.write_table(table, sink, write_page_checksum=True)
  return sink.getvalue()


def _cell(value):
  return "" if value is None else json.dumps(value) if isinstance(value, list) else value


def _expected(row):
  """Returns text, images, filters and uid of a query."""
  texts = [values.stored(row.get(key) or "") for key in ("title", "content")]
  names = {key: None if row.get(key) is None else tuple(map(str, row[key])) for key in ("allow", "deny", "categories")}
  images = [np.float16(image).tolist() for image in row.get("images") or () if image is not None]
  uid = row.get("uid")
  return (
    " ".join(text for text in texts if text.strip()),
    images,
    names["allow"],
    names["deny"] or (),
    names["categories"],
    None if uid is None else values.stored(str(uid)),
  )


def _clean(text):
  return text.replace("\r", "").replace("\n", " ")


def file_of(rng, suffix):
  """Returns a valid file."""
  rows = []
  for number in range(rng.randrange(1, 6)):
    row = {"title": _clean(values.odd_text(rng))}
    # In CSV, an empty cell counts as no value.
    optional = {
      "uid": f"{number}" + _clean(values.odd_text(rng)),
      "content": "c" + _clean(values.odd_text(rng)),
      "images": [[rng.randrange(-8, 9) / 8 for _ in range(DIM)] for _ in range(rng.randrange(4))],
      **{key: [_clean(values.odd_text(rng, 1)) for _ in range(rng.randrange(3))] for key in LISTS[1:]},
    }
    rows.append(row | {key: value for key, value in optional.items() if rng.random() < 0.5})
  return QueryFileCase(suffix, rows).write()


MUTATIONS = {}


def mutation(suffixes=SUFFIXES):
  def add(function):
    @st.composite
    def cases(draw):
      file = draw(st.builds(file_of, values.SEEDS, st.sampled_from(suffixes)))
      return file, function(draw, file)

    MUTATIONS[function.__name__.strip("_").replace("_", " ")] = cases()
    return function

  return add


def _pick(draw, file):
  number = draw(st.integers(0, len(file.rows) - 1))
  return number, file.rows[number]


def _set(draw, file, key, value, *naming):
  number, row = _pick(draw, file)
  row[key] = value
  file.write()
  return refused(file.place(number), *naming)


@mutation()
def nothing(draw, file):
  return file.expected()


@mutation((".jsonl", ".csv"))
def line_ends_and_byte_order_mark(draw, file):
  file.end = draw(st.sampled_from(["\n", "\r\n"]))
  return file.write(start=draw(st.sampled_from(["", "\ufeff"]))).expected()


@mutation((".jsonl",))
def half_surrogate_pairs(draw, file):
  _, row = _pick(draw, file)
  key = draw(st.sampled_from(["title", "content", "uid"]))
  row[key] = row.get(key, "") + draw(values.SURROGATES)
  return file.write().expected()


@mutation()
def long_title(draw, file):
  _pick(draw, file)[1]["title"] = draw(values.LONG_TEXTS)
  return file.write().expected()


@mutation((".jsonl",))
def null_values(draw, file):
  _, row = _pick(draw, file)
  row[draw(st.sampled_from([key for key in KEYS if key != "title"]))] = None
  return file.write().expected()


@mutation((".jsonl",))
def whole_number_as_uid(draw, file):
  _pick(draw, file)[1]["uid"] = draw(st.integers(-(10**40), 10**40))
  return file.write().expected()


@mutation((".jsonl",))
def text_of_a_wrong_type(draw, file):
  key = draw(st.sampled_from(["title", "content"]))
  return _set(draw, file, key, draw(values.values_except(str, type(None))), f"'{key}'")


@mutation((".jsonl",))
def uid_of_a_wrong_type(draw, file):
  return _set(draw, file, "uid", draw(values.values_except(str, int, type(None))), "'uid'")


@mutation((".jsonl",))
def list_of_a_wrong_type(draw, file):
  key = draw(st.sampled_from(LISTS))
  return _set(draw, file, key, draw(values.values_except(list, type(None))), f"'{key}'")


@mutation((".jsonl",))
def name_of_a_wrong_type(draw, file):
  key = draw(st.sampled_from(LISTS[1:]))
  return _set(draw, file, key, [draw(values.values_except(str, int))], f"'{key}'")


@mutation((".jsonl",))
def image_of_a_wrong_type(draw, file):
  return _set(draw, file, "images", [draw(values.values_except(str, list, type(None)))], "image")


@mutation(SUFFIXES)
def vector_of_another_size(draw, file):
  size = draw(st.integers(0, 9).filter(lambda size: size != DIM))
  return _set(draw, file, "images", [[0.5] * size], f"must be {DIM} numbers")


@mutation((".jsonl", ".csv"))
def vector_of_values_that_are_no_numbers(draw, file):
  bad = draw(st.sampled_from([None, "x", [], [1], {}, "1", True]))
  return _set(draw, file, "images", [[0.5, bad, 0.5, 0.5]], "vector")


@mutation((".jsonl", ".csv"))
def vector_that_is_not_finite(draw, file):
  number, row = _pick(draw, file)
  row["images"] = [[123456.5, 0, 0, 0]]
  bad = draw(st.one_of(values.NOT_FINITE, st.sampled_from(["65520", "-1e5"])))
  file.write([line.replace("123456.5", bad) for line in file.lines()])
  return refused(file.place(number), "vector")


@mutation((".jsonl", ".csv"))
def integer_with_thousands_of_digits(draw, file):
  number, row = _pick(draw, file)
  key = draw(st.sampled_from(KEYS if file.suffix == ".jsonl" else LISTS))
  row[key] = [123456.5] if key in LISTS else 123456.5
  huge = draw(values.HUGE_INTEGERS)
  file.write([line.replace("123456.5", huge) for line in file.lines()])
  return refused(file.place(number))


@mutation((".jsonl",))
def unknown_key(draw, file):
  key = draw(
    st.one_of(values.TEXTS, st.sampled_from(["Title", "titel", "x" * 100_000])).filter(lambda k: k not in KEYS)
  )
  return _set(draw, file, key, draw(values.values_except(type(None))), "unknown")


@mutation((".jsonl",))
def thousands_of_unknown_keys(draw, file):
  number, row = _pick(draw, file)
  row |= {f"key{i}": 1 for i in range(draw(st.integers(1_000, 20_000)))}
  file.write()
  return refused(file.place(number), "unknown")


@mutation((".jsonl",))
def no_title(draw, file):
  number, row = _pick(draw, file)
  del row["title"]
  file.write()
  return refused(file.place(number), "'title'")


@mutation(SUFFIXES)
def column_twice(draw, file):
  key = draw(st.sampled_from(KEYS))
  if file.suffix == ".parquet":
    table = file.arrow()
    file.content = parquet(table.append_column(key, table.column(key)))
    return refused(file.name, f"'{key}'")
  lines = file.lines()
  if file.suffix == ".csv":
    lines = [line.rstrip() + ',"' + (key if number == 0 else "") + '"\n' for number, line in enumerate(lines)]
    file.write(lines)
    return refused(f"{file.name}:1", f"'{key}'")
  number, row = _pick(draw, file)
  row.setdefault(key, "a")
  lines = file.lines()
  lines[number] = lines[number].rstrip()[:-1] + f', "{key}": {json.dumps(row[key])}' + "}\n"
  file.write(lines)
  return refused(file.place(number), f"'{key}'")


@mutation((".csv", ".parquet"))
def no_or_unknown_column(draw, file):
  kind = draw(st.sampled_from(["title", "other", "empty", "long"]))
  other = {"title": "titel", "other": "x", "empty": "", "long": "y" * 50_000}[kind]
  if file.suffix == ".parquet":
    table = file.arrow()
    file.content = parquet(table.rename_columns([other if key == "title" else key for key in KEYS]))
  else:
    file.write([file.lines()[0].replace("title", other), *file.lines()[1:]])
  return refused(file.name)


@mutation((".parquet",))
def column_of_a_wrong_type(draw, file):
  key = draw(st.sampled_from(KEYS))
  wrong = {
    "doubles": lambda count: pa.array([1.5] * count),
    "booleans": lambda count: pa.array([True] * count),
    "structs": lambda count: pa.array([{"a": 1}] * count),
    "bytes": lambda count: pa.array([b"a\xff"] * count),
    "lists of structs": lambda count: pa.array([[{"a": 1}]] * count),
    "lists of booleans": lambda count: pa.array([[True]] * count),
    "nulls": lambda count: pa.nulls(count),
  }
  table = file.arrow()
  made = wrong[draw(st.sampled_from(list(wrong)))](len(table))
  file.content = parquet(table.set_column(KEYS.index(key), key, made))
  return refused(file.name, f"'{key}'")


@mutation((".csv",))
def line_with_another_number_of_cells(draw, file):
  number, _ = _pick(draw, file)
  lines = file.lines()
  lines[number + 1] = draw(
    st.sampled_from([lines[number + 1].rstrip() + ',"x"\n', '"one"\n', lines[number + 1][:-1] + ",\n"])
  )
  file.write(lines)
  return refused(file.place(number), "cells")


@mutation((".csv",))
def quote_that_is_not_closed(draw, file):
  *lines, last = file.lines()
  lines.append('"' + last.replace('"', ""))
  file.write(lines)
  return refused(file.name)


@mutation((".jsonl", ".csv"))
def not_utf_8(draw, file):
  lines = "".join(file.lines()).encode().split(b"\n")
  number = draw(st.integers(0, len(lines) - 2))
  lines[number] = lines[number][:1] + draw(st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xe9"])) + lines[number][1:]
  file.content = b"\n".join(lines)
  return refused(f"{file.name}:{number + 1}", "UTF-8")


@mutation((".jsonl", ".csv"))
def utf_16(draw, file):
  file.content = "".join(file.lines()).encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-16-be"])))
  return refused(file.name)


@mutation((".jsonl",))
def line_that_is_no_query(draw, file):
  number, _ = _pick(draw, file)
  lines = file.lines()
  lines[number] = (
    draw(st.sampled_from(["[1]", "null", "3", "{", "{'title': 1}", "[" * 9000, '{"title": "a"} x'])) + "\n"
  )
  file.write(lines)
  return refused(file.place(number))


@mutation(SUFFIXES)
def other_contents(draw, file):
  file.content = draw(st.sampled_from([b"", b"\n\n", b"\0" * 99, b"PK\3\4", b"PAR1", b"PAR1PAR1", b"\x1f\x8b\x08\0"]))
  return refused(file.name)


@mutation((".parquet",))
def parquet_cut_off(draw, file):
  file.content = values.cut_off(draw, file.content)
  return refused(file.name)


@mutation((".parquet",))
def parquet_with_flipped_bits(draw, file):
  content = file.content
  footer = int.from_bytes(content[-8:-4], "little") + 8
  # The pages have checksums; the footer has none.
  file.content = content[:4] + values.bytes_flipped(draw, content[4:-footer]) + content[-footer:]
  return Expected(file.expected().value, (file.name,))


@mutation((".parquet",))
def footer_with_flipped_bits(draw, file):
  content = file.content
  footer = int.from_bytes(content[-8:-4], "little") + 8
  file.content = content[:-footer] + values.bytes_flipped(draw, content[-footer:])
  return Expected("anything", (file.name,))


@mutation((".csv",))
def cell_that_is_no_list(draw, file):
  number, row = _pick(draw, file)
  key = draw(st.sampled_from(LISTS))
  row[key] = draw(st.sampled_from(["[1", "[", "['a']", "[NaN", '["a"] b', "[" * 5000]))
  file.write()
  return refused(file.place(number), f"'{key}'")
