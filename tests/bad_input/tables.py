"""Tables of texts and labels in every format: valid ones, and mutations whose effect is known."""

import csv
import dataclasses
import gzip
import io
import json

from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input import values
from tests.bad_input.campaign import Expected, refused

COLUMNS = ("uid", "text", "content", "labels", "relevance", "split")
PACKED = (".csv.gz", ".tsv.gz", ".jsonl.gz")
SUFFIXES = (".csv", ".tsv", ".jsonl", *PACKED, ".parquet", ".arrow")
OF_TEXT = tuple(suffix for suffix in SUFFIXES if suffix not in (".parquet", ".arrow"))
_SCHEMA = pa.schema(
  [
    *((name, pa.string()) for name in ("uid", "text", "content")),
    ("labels", pa.list_(pa.string())),
    ("relevance", pa.list_(pa.float64())),
    ("split", pa.string()),
  ]
)


@dataclasses.dataclass
class Table:
  """A table as a file.

  Attributes:
    suffix: Suffix of the file.
    rows: Values of each row, in the order of `columns`.
    content: The file; None until `write`.
    columns: Names of the columns.
    end: End of the lines of CSV.
    start: What precedes the first line of a text file.
  """

  suffix: str
  rows: list[list[object]]
  content: bytes = b""
  columns: list[str] = dataclasses.field(default_factory=lambda: list(COLUMNS))
  end: str = "\r\n"
  start: str = ""

  @property
  def name(self):
    return "table" + self.suffix

  @property
  def is_csv(self):
    return self.suffix.startswith((".csv", ".tsv"))

  @property
  def is_json(self):
    return self.suffix.startswith(".jsonl")

  def write(self, lines=None):
    """Writes the rows, or the given lines."""
    if self.suffix in (".parquet", ".arrow"):
      self.content = _binary(self.suffix, self.arrow())
      return self
    text = self.start + ("".join(self.lines()) if lines is None else "".join(lines))
    self.content = text.encode(errors="surrogatepass")
    if self.suffix.endswith(".gz"):
      self.content = gzip.compress(self.content, 1)
    return self

  def lines(self):
    """Returns the header, if there is one, and each row as a text with the end of its line."""
    if self.is_csv:
      mark = "\t" if self.suffix.startswith(".tsv") else ","
      return [_csv_line(row, mark, self.end) for row in (list(self.columns), *self.rows)]
    return [self.json_line(row) for row in self.rows]

  def json_line(self, row):
    return json.dumps(dict(zip(self.columns, row, strict=True))) + "\n"

  def arrow(self):
    columns = zip(*self.rows, strict=True)
    return pa.table(
      [pa.array(column, _SCHEMA.field(name).type) for name, column in zip(self.columns, columns, strict=True)],
      names=self.columns,
    )

  def place(self, row):
    """Returns the place of a row as messages name it."""
    if self.suffix in (".parquet", ".arrow"):
      return f"{self.name}: row {row}"
    if self.is_json:
      return f"{self.name}:{row + 1}"
    return f"{self.name}:{1 + sum(line.count(self.end[-1]) for line in self.lines()[: row + 1])}"

  def expected(self):
    """Returns what the raw folder must have."""
    found = {"train": [], "test": []}
    names = {}
    for row in self.rows:
      value = dict(zip(self.columns, row, strict=True))
      labels = [label.strip() for label in value["labels"]]
      for label in labels:
        names.setdefault(label, len(names))
      found[value["split"]].append(
        {
          "uid": value["uid"].strip(),
          "title": value["text"].strip(),
          "content": value["content"].strip(),
          "target_ind": [names[label] for label in labels],
          "target_rel": value["relevance"],
        }
      )
    found["labels"] = [{"uid": name, "title": name, "content": ""} for name in names]
    return Expected(found)


def _csv_line(row, mark, end):
  sink = io.StringIO()
  cells = [json.dumps(cell) if isinstance(cell, list) else cell for cell in row]
  csv.writer(sink, delimiter=mark, lineterminator=end, quoting=csv.QUOTE_ALL).writerow(cells)
  return sink.getvalue()


def _binary(suffix, table):
  sink = io.BytesIO()
  if suffix == ".parquet":
    pq.write_table(table, sink, write_page_checksum=True)
  else:
    with pa.ipc.new_stream(sink, table.schema) as stream:
      stream.write_table(table)
  return sink.getvalue()


def _clean(text):
  """Returns a text without what no table may have (NUL) and without line ends, which CSV readers change."""
  return text.replace("\0", "").replace("\r", "").replace("\n", " ")


def table_of(rng, suffix):
  """Returns a valid table with at least one row of each split."""
  rows = []
  for number in range(rng.randrange(2, 6)):
    labels = list(dict.fromkeys("l" + _clean(values.odd_text(rng, 1)).strip() for _ in range(rng.randrange(1, 4))))
    rows.append(
      [
        f"{number}-{rng.randrange(99)}",
        "t" + _clean(values.odd_text(rng)) + "t",
        _clean(values.odd_text(rng)),
        labels,
        [rng.choice((1.0, 0.5, -2.25, 1e30)) for _ in labels],
        ("train", "test")[number] if number < 2 else rng.choice(("train", "test")),
      ]
    )
  return Table(suffix, rows).write()


def tables(suffixes):
  return st.builds(table_of, values.SEEDS, st.sampled_from(suffixes))


MUTATIONS = {}


def mutation(suffixes=SUFFIXES):
  def add(function):
    @st.composite
    def cases(draw):
      table = draw(tables(suffixes))
      return table, function(draw, table)

    MUTATIONS[function.__name__.strip("_").replace("_", " ")] = cases()
    return function

  return add


def _set(draw, table, column, value):
  """Writes a value that must be refused to a row, which the message must name, with the column."""
  number = draw(st.integers(0, len(table.rows) - 1))
  table.rows[number][table.columns.index(column)] = value
  table.write()
  return refused(table.place(number), f"'{column}'")


@mutation()
def nothing(draw, table):
  return table.expected()


@mutation(tuple(suffix for suffix in OF_TEXT if "jsonl" not in suffix))
def line_ends_and_byte_order_mark(draw, table):
  table.end, table.start = draw(st.sampled_from(["\n", "\r\n"])), draw(st.sampled_from(["", "\ufeff"]))
  return table.write().expected()


@mutation((".jsonl", ".jsonl.gz"))
def blank_lines_and_byte_order_mark(draw, table):
  lines = [line + draw(st.sampled_from(["", "\n", " \r\n"])) for line in table.lines()]
  table.start = draw(st.sampled_from(["", "\ufeff"]))
  return table.write(lines).expected()


@mutation()
def long_text(draw, table):
  table.rows[draw(st.integers(0, len(table.rows) - 1))][1] = draw(values.LONG_TEXTS)
  return table.write().expected()


@mutation()
def one_label(draw, table):
  for row in table.rows:
    row[3], row[4] = ["only"], [1.0]
  return table.write().expected()


@mutation()
def empty_text(draw, table):
  return _set(draw, table, "text", draw(st.sampled_from(["", " ", "\t", "\u2028", "\x85 "])))


@mutation()
def nul_in_a_text(draw, table):
  return _set(draw, table, draw(st.sampled_from(["text", "content", "uid"])), "a\0b")


@mutation()
def nul_in_a_label(draw, table):
  return _set(draw, table, "labels", ["a\0b"])


@mutation((".jsonl", ".jsonl.gz"))
def half_surrogate_pair(draw, table):
  return _set(draw, table, draw(st.sampled_from(["text", "content", "uid"])), "a" + draw(values.SURROGATES))


@mutation()
def no_labels(draw, table):
  return _set(draw, table, "labels", [])


@mutation()
def empty_label(draw, table):
  return _set(draw, table, "labels", ["a", draw(st.sampled_from(["", " ", "\u2003"]))])


@mutation((".jsonl", ".jsonl.gz"))
def text_of_a_wrong_type(draw, table):
  value = draw(values.values_except(str, type(None)).filter(lambda value: value == value))
  return _set(draw, table, draw(st.sampled_from(["text", "content"])), value)


@mutation((".jsonl", ".jsonl.gz"))
def uid_of_a_wrong_type(draw, table):
  return _set(draw, table, "uid", draw(values.values_except(str, int)))


@mutation((".jsonl", ".jsonl.gz"))
def labels_of_a_wrong_type(draw, table):
  return _set(draw, table, "labels", [draw(values.values_except(str, int))])


@mutation()
def split_of_another_name(draw, table):
  return _set(draw, table, "split", draw(st.sampled_from(["later", "tr ain", "0", "\u202etrain", "train,test"])))


@mutation()
def uid_twice(draw, table):
  first, _second = draw(st.sampled_from([(0, 1), (1, 0)]))
  table.rows.append(list(table.rows[first]))
  table.write()
  return refused(table.place(len(table.rows) - 1), table.place(first), "'uid'")


@mutation()
def relevance_of_another_length(draw, table):
  return _set(draw, table, "relevance", [1.0] * draw(st.integers(4, 9)))


@mutation((".csv", ".tsv", ".csv.gz", ".jsonl", ".jsonl.gz"))
def relevance_that_is_not_finite(draw, table):
  number = draw(st.integers(0, len(table.rows) - 1))
  table.rows[number][3], table.rows[number][4] = ["a"], ["@"]
  lines = [line.replace('["@"]', "[1e500]").replace('[""@""]', "[1e500]") for line in table.lines()]
  bad = f"[{draw(values.NOT_FINITE)}]"
  table.write([line.replace("[1e500]", bad) for line in lines])
  return refused(table.place(number), "'relevance'")


@mutation((".parquet", ".arrow"))
def relevance_in_arrow_that_is_not_finite(draw, table):
  number = draw(st.integers(0, len(table.rows) - 1))
  bad = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e39, -1e300]))
  table.rows[number][4] = [bad] * len(table.rows[number][3])
  table.write()
  return refused(table.place(number), "'relevance'")


@mutation((".csv", ".tsv", ".csv.gz", ".jsonl", ".jsonl.gz"))
def integer_with_thousands_of_digits(draw, table):
  number = draw(st.integers(0, len(table.rows) - 1))
  column = draw(st.sampled_from([3, 4] if table.is_csv else [0, 1, 2, 3, 4, 5]))
  table.rows[number][column] = ["@"]
  huge = draw(values.HUGE_INTEGERS)
  table.write([line.replace('"@"', huge).replace('""@""', huge).replace(f'"{huge}"', huge) for line in table.lines()])
  return refused(table.place(number))


@mutation((".csv", ".tsv", ".csv.gz", ".jsonl", ".parquet", ".arrow"))
def column_twice(draw, table):
  name = draw(st.sampled_from(COLUMNS))
  if table.suffix in (".parquet", ".arrow"):
    found = table.arrow()
    table.content = _binary(table.suffix, found.append_column(name, found.column(name)))
    return refused(table.name, f"'{name}'")
  if table.is_csv:
    table.columns.append(name)
    for row in table.rows:
      row.append(row[COLUMNS.index(name)])
    table.write()
    return refused(f"{table.name}:1", f"'{name}'")
  lines = table.lines()
  number = draw(st.integers(0, len(lines) - 1))
  value = json.dumps(table.rows[number][COLUMNS.index(name)])
  lines[number] = lines[number].rstrip()[:-1] + f', "{name}": {value}' + "}\n"
  table.write(lines)
  return refused(f"{table.name}:{number + 1}", f"'{name}'")


@mutation()
def no_column(draw, table):
  place = draw(st.integers(0, len(COLUMNS) - 1))
  name = table.columns.pop(place)
  for row in table.rows:
    row.pop(place)
  table.write()
  return refused(table.name, f"'{name}'")


@mutation((".csv", ".tsv", ".csv.gz"))
def line_with_another_number_of_cells(draw, table):
  number = draw(st.integers(0, len(table.rows) - 1))
  row = table.rows[number]
  table.rows[number] = draw(st.sampled_from([row[:-1], [*row, "more"], [*row, ""], row[:1]]))
  table.write()
  return refused(table.place(number), "cells")


@mutation((".csv", ".csv.gz", ".tsv"))
def quote_that_is_not_closed(draw, table):
  lines = table.lines()
  number = draw(st.integers(1, len(lines) - 1))
  lines[number] = lines[number].rstrip()[:-1] + table.end
  table.write(lines)
  return refused(table.name)


@mutation(OF_TEXT)
def not_utf_8(draw, table):
  content = "".join(table.lines()).encode()
  lines = content.split(b"\n")
  number = draw(st.integers(0, len(lines) - 2))
  lines[number] = lines[number][:1] + draw(st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xe9"])) + lines[number][1:]
  table.content = b"\n".join(lines)
  if table.suffix.endswith(".gz"):
    table.content = gzip.compress(table.content)
  return refused(f"{table.name}:{number + 1}", "UTF-8")


@mutation(OF_TEXT)
def utf_16(draw, table):
  table.content = "".join(table.lines()).encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-16-be"])))
  if table.suffix.endswith(".gz"):
    table.content = gzip.compress(table.content)
  return refused(table.name)


@mutation(PACKED)
def gzip_cut_off(draw, table):
  table.content = values.cut_off(draw, table.content)
  return refused(table.name)


@mutation(PACKED)
def gzip_with_flipped_bits(draw, table):
  table.content = values.bytes_flipped(draw, table.content)
  return Expected(table.expected().value, (table.name,))


@mutation((".csv", ".jsonl", ".parquet", ".arrow", ".csv.gz"))
def other_contents(draw, table):
  table.content = draw(st.one_of(st.binary(max_size=60), st.sampled_from([b"", b"\0" * 99, b"PK\3\4", b"PAR1PAR1"])))
  return refused(table.name)


@mutation((".jsonl", ".jsonl.gz"))
def line_that_is_no_object(draw, table):
  lines = table.lines()
  number = draw(st.integers(0, len(lines) - 1))
  lines[number] = draw(st.sampled_from(["[1]", "null", "3", '"a"', "{", "{'text': 1}", "[" * 9000, "{} {}"])) + "\n"
  table.write(lines)
  return refused(f"{table.name}:{number + 1}")


@mutation((".parquet",))
def parquet_cut_off(draw, table):
  table.content = values.cut_off(draw, table.content)
  return refused(table.name)


@mutation((".parquet",))
def parquet_with_flipped_bits(draw, table):
  content = table.content
  footer = int.from_bytes(content[-8:-4], "little") + 8
  # The pages have checksums; the footer has none.
  table.content = content[:4] + values.bytes_flipped(draw, content[4:-footer]) + content[-footer:]
  return Expected(table.expected().value, (table.name,))


@mutation((".arrow",))
def arrow_cut_off(draw, table):
  # Without the four or eight bytes at its end, an Arrow stream is still complete.
  table.content = table.content[: draw(st.integers(1, len(table.content) - 9))]
  return refused(table.name)


@mutation((".parquet", ".arrow"))
def column_of_a_wrong_type(draw, table):
  name = draw(st.sampled_from(["text", "content", "split", "labels", "uid"]))
  wrong = {
    "doubles": lambda count: pa.array([1.5] * count),
    "booleans": lambda count: pa.array([True] * count),
    "dates": lambda count: pa.array(np.zeros(count, "datetime64[s]")),
    "structs": lambda count: pa.array([{"a": 1, "b": 2}] * count),
    "bytes": lambda count: pa.array([b"a\xff"] * count),
    "nulls": lambda count: pa.nulls(count),
  }[draw(st.sampled_from(["doubles", "booleans", "dates", "structs", "bytes", "nulls"]))]
  found = table.arrow()
  if name == "content" and wrong(1).type == pa.null():
    name = "text"
  table.content = _binary(table.suffix, found.set_column(COLUMNS.index(name), name, wrong(len(found))))
  return refused(table.name, f"'{name}'")


@mutation((".jsonl", ".csv", ".parquet"))
def names_of_columns_that_are_long(draw, table):
  for place in range(len(COLUMNS)):
    table.columns[place] = "x" * draw(st.integers(1_000, 100_000)) + str(place)
  lines = [json.dumps(dict(zip(table.columns, row, strict=True))) + "\n" for row in table.rows]
  if table.suffix == ".parquet":
    table.content = _binary(".parquet", pa.table([pa.array(["a"])] * 6, names=table.columns))
  else:
    table.write(lines if table.is_json else None)
  return refused(table.name, "'text'")
