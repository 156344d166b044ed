"""The tokenized data set: tokens, positives and filters of all splits as memory-mapped arrays.

It is built once from a prepared data set, a few thousand rows at a time, and cached under a fingerprint of everything
that decides its contents.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Self

import numpy as np
import tensorflow_datasets as tfds

from vixml_jax.array_file import ArrayFile
from vixml_jax.datasets.prepared import check_contents
from vixml_jax.datasets.records import Record, Records
from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.manifest import cached_folder
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.stages import stage

_FORMAT = 1
# Version of the cached files, for the same corpus. 2: white space at the ends of texts is removed.
_CACHE_VERSION = 2
_TOKENS = {"train": "train_tokens", "test": "test_tokens", "labels": "label_tokens"}
_TEXT_FEATURES = ("title", "content")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A tokenized data set with N training queries, M test queries and L labels.

  Attributes:
    train_tokens: Token ids of the training queries, N rows of int32, special tokens included.
    test_tokens: Token ids of the test queries, M rows.
    label_tokens: Token ids of the labels, L rows; the row is the id of the label.
    train_labels: Ids of the positives of each training query, N rows of int32, in the order of the raw file.
    test_labels: Ids of the positives of each test query, M rows.
    train_filter: Ids of the labels that are removed before a training query is scored, N rows of int32.
    test_filter: The same for the test queries, M rows.
    num_labels: L.
    vocab_size: Number of token ids.
    fingerprint: sha256 in hex of the raw files, the tokenizer, its maximum length and the text fields.
    builder: The prepared data set, from which texts are read.
    text_fields: Names of the fields that make up the text of an item.
  """

  train_tokens: Ragged
  test_tokens: Ragged
  label_tokens: Ragged
  train_labels: Ragged
  test_labels: Ragged
  train_filter: Ragged
  test_filter: Ragged
  num_labels: int
  vocab_size: int
  fingerprint: str
  builder: tfds.core.DatasetBuilder = dataclasses.field(repr=False, compare=False)
  text_fields: tuple[str, ...]

  def label_text(self, ids: Sequence[int]) -> list[str]:
    """Returns the texts of labels, read from disk."""
    return _texts(self.builder, "labels", ids, self.text_fields)

  def query_text(self, split: str, ids: Sequence[int]) -> list[str]:
    """Returns the texts of rows of a split (`train` or `test`), read from disk."""
    return _texts(self.builder, split, ids, self.text_fields)


def load_corpus(
  builder: tfds.core.DatasetBuilder,
  tokenizer: Tokenizer,
  text_fields: Sequence[str] | None,
  cache_dir: str | os.PathLike[str],
) -> Corpus:
  """Tokenizes a prepared data set, or opens the files that an earlier call left in `cache_dir`, if they are whole.

  Args:
    builder: Prepared data set; see `vixml_jax.datasets.prepare`.
    tokenizer: Tokenizer of all texts.
    text_fields: Fields (`title`, `content`) that are joined by a space; None for the fields with which the data set
      was published.
    cache_dir: Folder for the arrays of all corpora.

  Returns:
    The corpus. Its values are memory-mapped.

  Raises:
    InputError: A text field is unknown, the data set is damaged, or the disk is full.
  """
  fields = tuple(text_fields or builder.info.metadata["text_fields"])
  unknown = [field for field in fields if field not in _TEXT_FEATURES]
  if unknown:
    raise InputError(f"unknown text field '{unknown[0]}'; choose from {', '.join(_TEXT_FEATURES)}")
  fingerprint = _fingerprint(builder, tokenizer, fields)
  folder = Path(cache_dir) / f"{builder.name}-{fingerprint[:16]}-v{_CACHE_VERSION}"

  def write(work: Path) -> None:
    check_contents(builder)
    for split in _TOKENS:
      _write_split(builder, split, tokenizer, fields, work)

  cached_folder(folder, write)
  arrays = {name: Ragged.load(folder / name) for name in _array_names()}
  return Corpus(
    **arrays,
    num_labels=len(arrays["label_tokens"]),
    vocab_size=tokenizer.vocab_size,
    fingerprint=fingerprint,
    builder=builder,
    text_fields=fields,
  )


def _array_names() -> list[str]:
  return [*_TOKENS.values(), "train_labels", "test_labels", "train_filter", "test_filter"]


def _fingerprint(builder: tfds.core.DatasetBuilder, tokenizer: Tokenizer, fields: tuple[str, ...]) -> str:
  return fingerprint_of(
    {
      "format": _FORMAT,
      "dataset": builder.name,
      "version": str(builder.version),
      "raw": builder.info.metadata["sha256"],
      "tokenizer": tokenizer.fingerprint,
      "max_length": tokenizer.max_length,
      "fields": fields,
    }
  )


def _write_split(
  builder: tfds.core.DatasetBuilder, split: str, tokenizer: Tokenizer, fields: tuple[str, ...], folder: Path
) -> None:
  records = Records(builder, split)
  lists = {} if split == "labels" else {"labels": "target_ind", "filter": "filter_ind"}
  with contextlib.ExitStack() as stack:
    tokens = stack.enter_context(_RaggedWriter(folder / _TOKENS[split]))
    writers = {
      feature: stack.enter_context(_RaggedWriter(folder / f"{split}_{name}")) for name, feature in lists.items()
    }
    progress = stack.enter_context(stage(f"tokenize {split}", total=len(records), unit="row", logged=False))
    for batch in records.batches():
      tokens.append(tokenizer([record.text(fields) for record in batch]))
      for feature, writer in writers.items():
        writer.append(_numbers(batch, feature))
      progress.advance(len(batch))


def _numbers(batch: list[Record], feature: str) -> Ragged:
  return Ragged.from_rows([record.numbers(feature, np.int32) for record in batch])


def _texts(builder: tfds.core.DatasetBuilder, split: str, ids: Sequence[int], fields: tuple[str, ...]) -> list[str]:
  return [record.text(fields) for record in Records(builder, split).take(ids)]


class _RaggedWriter:
  """Appends rows of int32 to the files that `Ragged.load` reads, without holding the values in memory."""

  def __init__(self, path: Path):
    self._path = path
    self._values = ArrayFile(f"{path}.values.npy", np.int32)
    self._lengths = [np.zeros(0, np.int64)]

  def append(self, rows: Ragged) -> None:
    self._values.append(rows.values)
    self._lengths.append(rows.lengths)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self._values.__exit__(*exception)
    np.save(f"{self._path}.offsets.npy", offsets_of(np.concatenate(self._lengths)))
