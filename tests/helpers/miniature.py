"""Writes small data sets in the raw format and a tiny tokenizer, so that tests need no downloads."""

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast

from vixml_jax.datasets import builders

WORDS = [
  "arrow",
  "left",
  "right",
  "up",
  "down",
  "circle",
  "square",
  "cloud",
  "sun",
  "rain",
  "snow",
  "user",
  "group",
  "file",
  "folder",
  "lock",
  "open",
  "close",
  "plus",
  "minus",
  "star",
  "heart",
  "book",
  "pen",
  "map",
  "pin",
  "home",
  "car",
  "bus",
  "train",
  "plane",
  "ship",
  "phone",
  "mail",
  "chat",
  "call",
  "clock",
  "alarm",
  "bell",
  "flag",
  "tag",
  "cart",
  "bag",
  "gift",
  "cake",
  "cup",
  "tree",
  "leaf",
  "flower",
  "fish",
  "bird",
  "cat",
  "dog",
  "horse",
  "code",
  "data",
  "disk",
  "chip",
]
SPLIT_NAMES = {"train": "trn", "test": "tst", "labels": "lbl"}


def write_raw_folder(
  folder: str | os.PathLike,
  *,
  num_train: int = 64,
  num_test: int = 16,
  num_labels: int = 24,
  images: bool = False,
  seed: int = 0,
) -> Path:
  """Writes a raw folder in which the words of a query determine its first label, with both filter files.

  A label is named by two words, and a query contains the words of its first label, so that a model can learn the set.

  Args:
    folder: Folder to write; it is created if it does not exist.
    num_train: Number of training queries.
    num_test: Number of test queries.
    num_labels: Number of labels.
    images: Whether to write images: 0 to 3 for a query, 0 or 1 for a label.
    seed: Seed of all random draws.

  Returns:
    The folder.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  titles = [f"{WORDS[i % len(WORDS)]} {WORDS[(i * 7 + 3) % len(WORDS)]}" for i in range(num_labels)]
  labels = [{"uid": f"label/{i}", "title": title, "content": f"about {title}"} for i, title in enumerate(titles)]
  write_lines(folder / "lbl.json.gz", labels)
  for split, rows in (("train", num_train), ("test", num_test)):
    write_lines(folder / f"{SPLIT_NAMES[split]}.json.gz", _queries(rng, split, rows, titles))
    pairs = [f"{row} {row % num_labels}" for row in range(0, rows, 5)]
    (folder / f"filter_labels_{split}.txt").write_text("".join(f"{pair}\n" for pair in pairs))
  if images:
    for split, rows in (("train", num_train), ("test", num_test), ("labels", num_labels)):
      _write_images(folder / f"{SPLIT_NAMES[split]}_images.parquet", rng, rows, 1 if split == "labels" else 3)
  return folder


def write_lines(path: Path, records: list[dict]) -> None:
  """Writes a gzip file with one JSON object per line, without a time stamp."""
  text = "".join(json.dumps(record) + "\n" for record in records)
  path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_lines(path: Path) -> list[dict]:
  """Reads a file that `write_lines` has written."""
  return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def expect_miniature(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
  """Makes the builder `name` expect the numbers of rows of the miniature in `folder`."""
  counts = {split: len(read_lines(folder / f"{file}.json.gz")) for split, file in SPLIT_NAMES.items()}
  monkeypatch.setitem(builders.EXPECTED_COUNTS, name, counts)


def write_tokenizer(folder: str | os.PathLike) -> Path:
  """Saves a WordPiece tokenizer with the words of the miniature and single letters."""
  folder = Path(folder)
  letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "about", *WORDS, *letters]
  pieces += [f"##{letter}" for letter in letters]
  vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
  tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
  )
  BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
  return folder


def _queries(rng: np.random.Generator, split: str, rows: int, titles: list[str]) -> list[dict]:
  queries = []
  for row in range(rows):
    count = int(rng.integers(1, min(4, len(titles)) + 1))
    targets = [row % len(titles), *rng.permutation(len(titles))[:count].tolist()]
    targets = list(dict.fromkeys(targets))
    words = rng.choice(WORDS, size=int(rng.integers(1, 4))).tolist()
    queries.append(
      {
        "uid": f"{split}/{row}",
        "title": " ".join([titles[targets[0]], *words]),
        "content": " ".join(rng.choice(WORDS, size=12)),
        "target_ind": targets,
        "target_rel": [1.0] * len(targets),
      }
    )
  return queries


def _write_images(path: Path, rng: np.random.Generator, rows: int, most: int) -> None:
  records = []
  for row in range(rows):
    for slot in range(int(rng.integers(0, most + 1))):
      buffer = io.BytesIO()
      Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
      records.append({"row": row, "slot": slot, "png": buffer.getvalue()})
  schema = pa.schema([("row", pa.int32()), ("slot", pa.int8()), ("png", pa.binary())])
  pq.write_table(pa.Table.from_pylist(records, schema), path)
