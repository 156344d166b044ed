"""Raw folders in JSON and in text: valid ones, and mutations whose effect is known."""

import dataclasses
import gzip
import io
import itertools
import json

from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input import values
from tests.bad_input.campaign import Expected, refused

ROWS = {"train": "trn.json.gz", "test": "tst.json.gz", "labels": "lbl.json.gz"}
TEXT_ROWS = {"train": "train.raw.txt", "test": "test.raw.txt", "labels": "label.raw.txt"}
TARGETS = {"train": "trn_X_Y.txt", "test": "tst_X_Y.txt"}
FILTERS = {"train": "filter_labels_train.txt", "test": "filter_labels_test.txt"}
IMAGES = {"train": "trn_images.parquet", "test": "tst_images.parquet", "labels": "lbl_images.parquet"}
PNG = b"\x89PNG\r\n\x1a\n and more"
HEADS = (PNG, b"\xff\xd8\xff\xe0", b"RIFF1234WEBP", b"GIF89a", b"BM12")


@dataclasses.dataclass
class Row:
  """A query or a label; `source` has a JSON text for every key that the file has."""

  uid: str
  title: str
  content: str
  ids: list[int]
  relevance: list[float]
  source: dict[str, str] = dataclasses.field(default_factory=dict)

  def write(self, is_query, ascii_only=True):
    for key in ("uid", "title", "content"):
      self.source[key] = json.dumps(getattr(self, key), ensure_ascii=ascii_only)
    if is_query:
      self.source["target_ind"], self.source["target_rel"] = json.dumps(self.ids), json.dumps(self.relevance)
    return self

  @property
  def line(self):
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in self.source.items()) + "}"

  def expected(self):
    """What must be read: the first of repeated targets, and texts as they are stored."""
    pairs = dict(zip(reversed(self.ids), reversed(self.relevance), strict=True))
    ids = list(dict.fromkeys(self.ids))
    texts = [values.stored(text) for text in (self.title, self.content)]
    return (
      values.stored(self.uid),
      *(text if text.strip() else "" for text in texts),
      ids,
      [float(np.float32(pairs[i])) for i in ids],
    )


@dataclasses.dataclass
class Folder:
  """A raw folder: its rows by split, its files, and what must be read."""

  rows: dict[str, list[Row]]
  files: dict[str, bytes]
  images: dict[str, list[tuple[int, int, bytes]]] = dataclasses.field(default_factory=dict)

  @property
  def num_labels(self):
    return len(self.rows["labels"])

  def write_rows(self, end="\n", start=""):
    for split, rows in self.rows.items():
      text = start + "".join(row.line + end for row in rows)
      self.files[ROWS[split]] = packed(text.encode(errors="surrogatepass"))
    return self

  def expected(self):
    rows = {split: [row.expected() for row in rows] for split, rows in self.rows.items()}
    return Expected(rows | {"images": {split: [] for split in rows} | self.images})


def packed(content):
  return gzip.compress(content, 1)


def folder_of(rng):
  """Returns a valid folder in JSON, written with or without escapes."""
  names = list(dict.fromkeys(values.filled_text(rng) for _ in range(rng.randrange(1, 6))))
  rows = {"labels": [Row(name, values.odd_text(rng), values.odd_text(rng), [], []) for name in names]}
  for split in ("train", "test"):
    rows[split] = []
    for number in range(rng.randrange(1, 5)):
      ids = rng.choices(range(len(names)), k=rng.randrange(5))
      relevance = [rng.choice((0, 1, -1.5, 0.1, 1e30, rng.random())) for _ in ids]
      rows[split].append(Row(f"{split}/{number}", values.odd_text(rng), values.odd_text(rng), ids, relevance))
  ascii_only = rng.random() < 0.5
  for split, found in rows.items():
    for row in found:
      row.write(split != "labels", ascii_only)
  return Folder(rows, {}).write_rows()


FOLDERS = values.SEEDS.map(folder_of)
QUERIES = st.sampled_from(["train", "test"])
SPLITS = st.sampled_from(["train", "test", "labels"])


def pick(draw, folder, splits=SPLITS):
  """Returns a split, one of its rows, and its place."""
  split = draw(splits)
  number = draw(st.integers(0, len(folder.rows[split]) - 1))
  return split, folder.rows[split][number], f"{ROWS[split]}:{number + 1}"


MUTATIONS = {}


def mutation(function):
  """Adds the folders that a function of `draw` and a valid folder makes, with what they must give."""

  @st.composite
  def cases(draw):
    folder = draw(FOLDERS)
    return folder, function(draw, folder)

  MUTATIONS[function.__name__.strip("_").replace("_", " ")] = cases()
  return function


def _set(draw, folder, key, source, splits=QUERIES):
  """Writes a JSON text for a key of a row, which must be refused."""
  _, row, place = pick(draw, folder, splits)
  row.source[key] = source
  folder.write_rows()
  return refused(place, key)


@mutation
def nothing(draw, folder):
  return folder.expected()


@mutation
def line_ends_and_byte_order_mark(draw, folder):
  folder.write_rows(draw(st.sampled_from(["\n", "\r\n", " \n"])), draw(st.sampled_from(["", "\ufeff"])))
  return folder.expected()


@mutation
def members_of_gzip(draw, folder):
  split = draw(SPLITS)
  lines = [row.line.encode() + b"\n" for row in folder.rows[split]]
  folder.files[ROWS[split]] = b"".join(map(packed, lines))
  return folder.expected()


@mutation
def half_surrogate_pairs(draw, folder):
  split, row, _ = pick(draw, folder)
  key = draw(st.sampled_from(["title", "content"]))
  setattr(row, key, getattr(row, key) + draw(values.SURROGATES))
  row.write(split != "labels")
  return folder.write_rows().expected()


@mutation
def long_title(draw, folder):
  split, row, _ = pick(draw, folder)
  row.title = draw(values.LONG_TEXTS)
  row.write(split != "labels", ascii_only=False)
  return folder.write_rows().expected()


@mutation
def one_label(draw, folder):
  del folder.rows["labels"][1:]
  for row in folder.rows["train"] + folder.rows["test"]:
    row.ids = [0] * len(row.ids)
    row.write(True)
  return folder.write_rows().expected()


@mutation
def whole_number_as_uid(draw, folder):
  _split, row, _ = pick(draw, folder)
  number = draw(st.integers(-(10**30), 10**30))
  row.uid, row.source["uid"] = str(number), str(number)
  return folder.write_rows().expected()


@mutation
def uid_of_another_query(draw, folder):
  split, row, _ = pick(draw, folder, QUERIES)
  row.uid = folder.rows[split][0].uid
  row.write(True)
  return folder.write_rows().expected()


@mutation
def unknown_key(draw, folder):
  _, row, _ = pick(draw, folder)
  row.source[draw(values.TEXTS.filter(lambda key: key not in row.source))] = json.dumps(draw(values.JSON_VALUES))
  return folder.write_rows().expected()


@mutation
def no_content(draw, folder):
  _, row, _ = pick(draw, folder)
  row.content = ""
  del row.source["content"]
  return folder.write_rows().expected()


@mutation
def no_key(draw, folder):
  split, row, place = pick(draw, folder)
  key = draw(st.sampled_from(["uid", "title"] + ["target_ind", "target_rel"] * (split != "labels")))
  del row.source[key]
  folder.write_rows()
  return refused(place, f"'{key}' is missing")


@mutation
def key_twice(draw, folder):
  _, row, place = pick(draw, folder)
  key = draw(st.sampled_from(list(row.source)))
  line = row.line
  row.source = {key: row.source[key]}
  folder.write_rows()
  both = line[:-1] + ", " + row.line[1:]
  for split, rows in folder.rows.items():
    if row in rows:
      lines = [both if other is row else other.line for other in rows]
      folder.files[ROWS[split]] = packed("\n".join(lines).encode())
  return refused(place, key)


@mutation
def text_of_a_wrong_type(draw, folder):
  key = draw(st.sampled_from(["title", "content"]))
  return _set(draw, folder, key, json.dumps(draw(values.values_except(str))), SPLITS)


@mutation
def uid_of_a_wrong_type(draw, folder):
  return _set(draw, folder, "uid", json.dumps(draw(values.values_except(str, int))), SPLITS)


@mutation
def list_of_a_wrong_type(draw, folder):
  key = draw(st.sampled_from(["target_ind", "target_rel"]))
  return _set(draw, folder, key, json.dumps(draw(values.values_except(list))))


@mutation
def item_of_a_wrong_type(draw, folder):
  key, allowed = draw(st.sampled_from([("target_ind", (int,)), ("target_rel", (int, float))]))
  return _set(draw, folder, key, json.dumps([0, draw(values.values_except(*allowed))]))


@mutation
def label_out_of_range(draw, folder):
  number = draw(st.one_of(st.integers(max_value=-1), st.integers(min_value=folder.num_labels)))
  _, row, place = pick(draw, folder, QUERIES)
  row.source |= {"target_ind": f"[0, {number}]", "target_rel": "[1, 1]"}
  folder.write_rows()
  return refused(place, "target_ind", str(number)[:20])


@mutation
def relevance_that_is_not_finite(draw, folder):
  _, row, place = pick(draw, folder, QUERIES)
  row.source |= {"target_ind": "[0]", "target_rel": f"[{draw(values.NOT_FINITE)}]"}
  folder.write_rows()
  return refused(place, "target_rel")


@mutation
def integer_with_thousands_of_digits(draw, folder):
  split, row, place = pick(draw, folder)
  keys = ["uid", "title", "content", "other"] + ["target_ind", "target_rel"] * (split != "labels")
  key, number = draw(st.sampled_from(keys)), draw(values.HUGE_INTEGERS)
  row.source[key] = f"[{number}]" if key.startswith("target") else number
  folder.write_rows()
  return refused(place)


@mutation
def lists_of_different_lengths(draw, folder):
  _, row, place = pick(draw, folder, QUERIES)
  row.source["target_rel"] = json.dumps([1.0] * (len(row.ids) + draw(st.integers(1, 3))))
  folder.write_rows()
  return refused(place, "equal lengths")


@mutation
def label_twice(draw, folder):
  first = folder.rows["labels"][draw(st.integers(0, folder.num_labels - 1))]
  folder.rows["labels"].append(Row(first.uid, "", "", [], []).write(False))
  folder.write_rows()
  return refused(f"{ROWS['labels']}:{folder.num_labels}", "the same uid")


_BAD_LINES = {
  "": "empty line",
  " \t": "empty line",
  "[1]": "JSON object",
  "null": "JSON object",
  '"title"': "JSON object",
  "{": "malformed JSON",
  "{'uid': 1}": "malformed JSON",
  "[" * 5_000: "malformed JSON",
  '{"a":' * 5_000: "malformed JSON",
}


@mutation
def line_that_is_no_object(draw, folder):
  split, row, place = pick(draw, folder)
  bad = draw(st.sampled_from(list(_BAD_LINES)))
  lines = [bad if other is row else other.line for other in folder.rows[split]]
  folder.files[ROWS[split]] = packed("".join(line + "\n" for line in lines).encode())
  return refused(place, _BAD_LINES[bad])


@mutation
def line_cut_off(draw, folder):
  split, row, place = pick(draw, folder)
  cut = row.line[: draw(st.integers(1, len(row.line) - 1))]
  lines = [cut if other is row else other.line for other in folder.rows[split]]
  folder.files[ROWS[split]] = packed("".join(line + "\n" for line in lines).encode(errors="surrogatepass"))
  return refused(place)


@mutation
def not_utf_8(draw, folder):
  split, row, place = pick(draw, folder)
  bad = draw(st.sampled_from([b"\xff", b"\xe9 ", b"\xed\xa0\x80", b"\xc0\x80", "é".encode("utf-16")]))
  lines = [other.line.encode() for other in folder.rows[split]]
  number = folder.rows[split].index(row)
  lines[number] = lines[number][:-1] + b', "x": "' + bad + b'"}'
  folder.files[ROWS[split]] = packed(b"\n".join(lines) + b"\n")
  return refused(place, "UTF-8")


@mutation
def utf_16(draw, folder):
  split, _, _ = pick(draw, folder)
  text = gzip.decompress(folder.files[ROWS[split]]).decode()
  folder.files[ROWS[split]] = packed(text.encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-16-be"]))))
  return refused(f"{ROWS[split]}:1")


@mutation
def gzip_cut_off(draw, folder):
  name = ROWS[draw(SPLITS)]
  folder.files[name] = values.cut_off(draw, folder.files[name])
  return refused(name)


@mutation
def gzip_with_flipped_bits(draw, folder):
  name = ROWS[draw(SPLITS)]
  folder.files[name] = values.bytes_flipped(draw, folder.files[name])
  # Flags, time and name in the header do not change the contents.
  return Expected(folder.expected().value, (name,))


@mutation
def no_gzip(draw, folder):
  name = ROWS[draw(SPLITS)]
  folder.files[name] = draw(st.one_of(st.just(gzip.decompress(folder.files[name])), st.binary(min_size=1, max_size=40)))
  return refused(name)


@mutation
def empty_file(draw, folder):
  name = ROWS[draw(SPLITS)]
  folder.files[name] = draw(st.sampled_from([b"", packed(b"")]))
  return refused(name, "empty")


@mutation
def missing_file(draw, folder):
  name = ROWS[draw(SPLITS)]
  del folder.files[name]
  return refused(name, "missing")


def _filters(draw, folder, extra=()):
  """Writes both filter files; the training one with further lines, whose first one is bad."""
  good = {}
  for split, name in FILTERS.items():
    rng, rows = draw(values.SEEDS), len(folder.rows[split])
    good[split] = [f"{rng.randrange(rows)} {rng.randrange(folder.num_labels)}" for _ in range(rng.randrange(1, 6))]
    folder.files[name] = "".join(line + "\n" for line in good[split]).encode()
  if extra:
    folder.files[FILTERS["train"]] += "".join(line + "\n" for line in extra).encode()
  return refused(f"{FILTERS['train']}:{len(good['train']) + 1}")


@mutation
def good_filters(draw, folder):
  _filters(draw, folder)
  return folder.expected()


@mutation
def bad_line_of_a_filter(draw, folder):
  rows, labels = len(folder.rows["train"]), folder.num_labels
  bad = st.one_of(
    st.sampled_from(
      ["0", "0 0 0", "-1 0", "0 -1", "0 1.0", "a b", "0,0", "0x0 0", "1_0 0", "\u0660 0", "0\0 0", "NaN 0"]
    ),
    st.integers(rows, 10**30).map(lambda row: f"{row} 0"),
    st.integers(labels, 10**30).map(lambda label: f"0 {label}"),
    values.HUGE_INTEGERS.map(lambda number: f"{number} 0"),
    values.HUGE_INTEGERS.map(lambda number: f"0 {number}"),
  )
  return _filters(draw, folder, [draw(bad)])


@mutation
def one_filter_only(draw, folder):
  _filters(draw, folder)
  name = FILTERS[draw(QUERIES)]
  del folder.files[name]
  return refused(name, "missing")


def _parquet(table, **options):
  sink = io.BytesIO()
  pq.write_table(table, sink, write_page_checksum=True, **options)
  return sink.getvalue()


_TYPES = pa.int32(), pa.int32(), pa.binary()


def _image_table(rows, slots, blobs, types=_TYPES):
  arrays = [pa.array(column, kind) for column, kind in zip((rows, slots, blobs), types, strict=True)]
  return pa.table(arrays, names=["row", "slot", "png"])


def _images(draw, folder):
  """Returns a split and a sorted list of row, slot and bytes of its images, at least two."""
  split, rng = draw(SPLITS), draw(values.SEEDS)
  places = itertools.product(range(len(folder.rows[split])), range(5))
  return split, [[*place, rng.choice(HEADS)] for place in sorted(rng.sample(list(places), rng.randrange(2, 6)))]


@mutation
def good_images(draw, folder):
  split, images = _images(draw, folder)
  folder.files[IMAGES[split]] = _parquet(_image_table(*zip(*images, strict=True)))
  folder.images[split] = [tuple(image) for image in images]
  return folder.expected()


@mutation
def bad_record_of_images(draw, folder):
  split, images = _images(draw, folder)
  number = draw(st.integers(0, len(images) - 1))
  record, kind = images[number], draw(st.sampled_from(["row", "slot", "order", "bytes", "null"]))
  types = pa.int64(), pa.int64(), pa.binary()
  if kind == "row":
    record[0] = draw(st.one_of(st.integers(-(2**63), -1), st.integers(len(folder.rows[split]), 2**63 - 1)))
  elif kind == "slot":
    record[1] = draw(st.one_of(st.integers(-(2**63), -1), st.integers(2**31, 2**63 - 1)))
  elif kind == "order":
    number = len(images) if number == len(images) - 1 else number + 1
    images.insert(number, images[number - 1])
  elif kind == "bytes":
    record[2] = draw(st.sampled_from([b"", b"<svg>", b"\x89PN", b"P6 1 1 255\n", b"%!PS-Adobe"]))
  else:
    record[draw(st.integers(0, 2))] = None
  folder.files[IMAGES[split]] = _parquet(_image_table(*zip(*images, strict=True), types))
  return refused(IMAGES[split], f"record {number}")


@mutation
def bad_columns_of_images(draw, folder):
  split, images = _images(draw, folder)
  table = _image_table(*zip(*images, strict=True))
  kind = draw(st.sampled_from(["drop", "type", "twice", "nothing"]))
  column = draw(st.integers(0, 2))
  if kind == "drop":
    table = table.drop_columns(table.column_names[column])
  elif kind == "type":
    wrong = [1.5] * len(table) if column < 2 else ["x"] * len(table)
    table = table.set_column(column, table.column_names[column], pa.array(wrong))
  elif kind == "twice":
    table = table.append_column(table.column_names[column], table.column(column))
  else:
    table = pa.table({})
  folder.files[IMAGES[split]] = _parquet(table)
  return refused(IMAGES[split])


@mutation
def parquet_cut_off(draw, folder):
  split, images = _images(draw, folder)
  folder.files[IMAGES[split]] = values.cut_off(draw, _parquet(_image_table(*zip(*images, strict=True))))
  return refused(IMAGES[split])


@mutation
def parquet_with_flipped_bits(draw, folder):
  split, images = _images(draw, folder)
  content = _parquet(_image_table(*zip(*images, strict=True)))
  footer = int.from_bytes(content[-8:-4], "little") + 8
  pages = content[4:-footer]
  # The pages have checksums; the footer has none.
  folder.files[IMAGES[split]] = content[:4] + values.bytes_flipped(draw, pages) + content[-footer:]
  folder.images[split] = [tuple(image) for image in images]
  return Expected(folder.expected().value, (IMAGES[split],))


# Folders of text: `uid->title`, and a matrix of positives.


@st.composite
def _text_folders(draw):
  folder, rng = draw(FOLDERS), draw(values.SEEDS)
  latin = [chr(code) for code in range(256) if chr(code) not in "\r\n"]
  for split, rows in folder.rows.items():
    for number, row in enumerate(rows):
      row.uid = f"{split}-{number}-" + "".join(rng.choices("xyz!?é", k=2))
      row.title, row.content = "".join(rng.choices(latin, k=rng.randrange(8))), ""
  return folder


def _write_text(folder):
  """Writes the files of a folder of text."""
  folder.files = {}
  for split, rows in folder.rows.items():
    lines = [f"{row.uid}->{row.title}" for row in rows]
    folder.files[TEXT_ROWS[split]] = "".join(line + "\n" for line in lines).encode("latin-1")
    if split in TARGETS:
      pairs = [zip(row.ids, row.relevance, strict=True) for row in rows]
      lines = [f"{len(rows)} {folder.num_labels}", *(" ".join(f"{i}:{r!r}" for i, r in pair) for pair in pairs)]
      folder.files[TARGETS[split]] = "".join(line + "\n" for line in lines).encode()
  return folder


def text_mutation(function):
  @st.composite
  def cases(draw):
    folder = _write_text(draw(_text_folders()))
    return folder, function(draw, folder)

  MUTATIONS["text: " + function.__name__.strip("_").replace("_", " ")] = cases()
  return function


@text_mutation
def good_text(draw, folder):
  return folder.expected()


@text_mutation
def line_without_an_arrow(draw, folder):
  split, row, _place = pick(draw, folder)
  lines = folder.files[TEXT_ROWS[split]].split(b"\n")
  number = folder.rows[split].index(row)
  lines[number] = draw(st.sampled_from([b"", b"no arrow", b"->no uid", b"a-> b".replace(b"->", b"-")]))
  folder.files[TEXT_ROWS[split]] = b"\n".join(lines)
  return refused(f"{TEXT_ROWS[split]}:{number + 1}")


@text_mutation
def bad_pair_of_the_matrix(draw, folder):
  split, row, _ = pick(draw, folder, QUERIES)
  number = folder.rows[split].index(row)
  bad = st.one_of(
    st.sampled_from(["0", "0:", ":1", "0:1:1", "a:1", "0:a", "0.0:1", "-1:1", "0:nan", "0:inf", "0:1e400", "0:1e39"]),
    st.sampled_from(["0_0:1", "0:1_0", "\u0660:1", "0:\u0661", "0:1\0", "+0:1", "-0:1"]),
    st.integers(folder.num_labels, 10**30).map(lambda label: f"{label}:1"),
    values.HUGE_INTEGERS.map(lambda label: f"{label}:1"),
    values.HUGE_INTEGERS.map(lambda label: f"0:{label}"),
  )
  lines = folder.files[TARGETS[split]].split(b"\n")
  lines[number + 1] = draw(bad).encode()
  folder.files[TARGETS[split]] = b"\n".join(lines)
  return refused(f"{TARGETS[split]}:{number + 2}")


@text_mutation
def bad_header_of_the_matrix(draw, folder):
  split = draw(QUERIES)
  rows, labels = len(folder.rows[split]), folder.num_labels
  bad = [b"", b"%d" % rows, b"%d %d 1" % (rows, labels), b"%d %d" % (rows + 1, labels), b"%d %d" % (rows, labels + 1)]
  lines = folder.files[TARGETS[split]].split(b"\n")
  lines[0] = draw(st.sampled_from([*bad, b"-1 -1", b"a b", b"9" * 5000]))
  folder.files[TARGETS[split]] = b"\n".join(lines)
  return refused(f"{TARGETS[split]}:1")


@text_mutation
def row_of_the_matrix_too_many_or_missing(draw, folder):
  split = draw(QUERIES)
  lines = folder.files[TARGETS[split]].removesuffix(b"\n").split(b"\n")
  lines = draw(st.sampled_from([lines[:-1], [*lines, b"0:1"]]))
  folder.files[TARGETS[split]] = b"\n".join(lines) + b"\n"
  return refused(TARGETS[split])


@text_mutation
def missing_text_file(draw, folder):
  name = draw(st.sampled_from(sorted(folder.files)))
  del folder.files[name]
  return refused(name, "missing")
