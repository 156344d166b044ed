"""The tokenized data set: tokens, positives and filters of a whole set as memory-mapped arrays.

Built once from a prepared data set, in a few thousand rows at a time, and cached under a
fingerprint of all that decides its contents.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vixml_jax.array_file import ArrayFile
from vixml_jax.datasets.records import Record, Records
from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of, locked, new_folder
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.ragged import Ragged, offsets_of

_FORMAT = 1
_TOKENS = {"train": "train_tokens", "test": "test_tokens", "labels": "label_tokens"}
_TEXT_FEATURES = ("title", "content")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A tokenized data set of N training queries, M test queries and L labels.

  Attributes:
    train_tokens: N rows of int32 token ids with special tokens, at most `max_length` each.
    test_tokens: M such rows.
    label_tokens: L such rows; the row is the label's id.
    train_labels: N rows of int32 label ids, the positives, in the order of the raw file.
    test_labels: M such rows.
    train_filter: N rows of int32 label ids to take out before a query is scored.
    test_filter: M such rows.
    num_labels: L.
    vocab_size: number of token ids.
    fingerprint: sha256 in hex of raw files, tokenizer, length and text fields.
    builder: the prepared data set, for texts and images.
    text_fields: the text features that make up an item's text.
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
    """Text of the given labels, read from disk."""
    return _texts(self.builder, "labels", ids, self.text_fields)

  def query_text(self, split: str, ids: Sequence[int]) -> list[str]:
    """Text of the given rows of `train` or `test`, read from disk."""
    return _texts(self.builder, split, ids, self.text_fields)


def load_corpus(
  builder: tfds.core.DatasetBuilder,
  tokenizer_dir: str | os.PathLike,
  max_length: int,
  text_fields: Sequence[str] | None,
  cache_dir: str | os.PathLike,
) -> Corpus:
  """Tokenizes a prepared data set, or opens what an earlier call left in `cache_dir`.

  Args:
    builder: what `vixml_jax.datasets.prepare` returns.
    tokenizer_dir: folder (or hub name) of a fast Hugging Face tokenizer.
    max_length: T, most tokens of a text, special tokens included; longer texts are cut on the
      right.
    text_fields: text features to join by a space, of `title` and `content`; None stands for the
      fields that the data set is published with.
    cache_dir: folder for the arrays of all corpora.

  Returns:
    The corpus, its values memory-mapped.

  Raises:
    InputError: unknown text field, no usable tokenizer or a cache that cannot be read.
  """
  metadata = builder.info.metadata
  fields = tuple(text_fields or metadata["text_fields"])
  unknown = [field for field in fields if field not in _TEXT_FEATURES]
  if unknown:
    raise InputError(f"unknown text field '{unknown[0]}'; known are {', '.join(_TEXT_FEATURES)}")
  tokenizer = Tokenizer(tokenizer_dir, max_length)
  fingerprint = _fingerprint(builder, tokenizer, fields)
  folder = Path(cache_dir) / f"{builder.name}-{fingerprint[:16]}"
  with locked(f"{folder}.lock"):
    if not folder.is_dir():
      with new_folder(folder) as work:
        for split in _TOKENS:
          _write_split(builder, split, tokenizer, fields, work)
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
    bar = stack.enter_context(tqdm(total=len(records), desc=f"tokenize {split}", unit=" rows", disable=None))
    for batch in records.batches():
      tokens.append(tokenizer([record.text(fields) for record in batch]))
      for feature, writer in writers.items():
        writer.append(_numbers(batch, feature))
      bar.update(len(batch))


def _numbers(batch: list[Record], feature: str) -> Ragged:
  return Ragged.from_rows([record.numbers(feature, np.int32) for record in batch])


def _texts(builder: tfds.core.DatasetBuilder, split: str, ids: Sequence[int], fields: tuple[str, ...]) -> list[str]:
  return [record.text(fields) for record in Records(builder, split).take(ids)]


class _RaggedWriter:
  """Appends rows of int32 to the files that `Ragged.load` maps, without holding the values in memory."""

  def __init__(self, path: Path):
    self._path = path
    self._values = ArrayFile(f"{path}.values.npy", np.int32)
    self._lengths = [np.zeros(0, np.int64)]

  def append(self, rows: Ragged) -> None:
    self._values.append(rows.values)
    self._lengths.append(rows.lengths)

  def __enter__(self) -> "_RaggedWriter":
    return self

  def __exit__(self, *exception) -> None:
    self._values.__exit__(*exception)
    np.save(f"{self._path}.offsets.npy", offsets_of(np.concatenate(self._lengths)))
