"""Data sets for `train`: a raw folder, a table, or the set in this package."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vixml_jax.datasets import raw, raw_rows
from vixml_jax.datasets.bucket_sets import local_raw_folder, prepare_shared
from vixml_jax.datasets.builders import BUILDERS
from vixml_jax.datasets.prepared import EMBEDDED
from vixml_jax.datasets.records import Record, Records
from vixml_jax.errors import InputError
from vixml_jax.remote import is_remote
from vixml_jax.search.text_table import TextTable

if TYPE_CHECKING:
  from vixml_jax.tables import Columns

_DATA = Path("data")  # As `dataset.data_dir` of the configs.


class LabeledQuery(NamedTuple):
  """A query of a data set.

  Attributes:
    query: The query as `Model.predict` takes it; `deny` has the labels that are not scored for it.
    labels: Uids of its labels.
  """

  query: dict[str, Any]
  labels: list[str]


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
  """Training queries, test queries and labels, with texts and optional images.

  One of `from_table`, `from_folder` and `embedded` makes it. Nothing is converted until the set is used.

  Attributes:
    name: Name of the data set: "custom", or that of a published one.
    raw_dir: Folder of the raw files, or its URL in a bucket.
    data_dir: Folder for what is made from them: the converted set, tokens, vectors of images. Of a URL, the cache keeps
      tokens and vectors.
  """

  name: str
  raw_dir: Path | str
  data_dir: Path | str

  @classmethod
  def from_table(
    cls,
    data: Any,
    labels: Any = None,
    *,
    test: Any = None,
    columns: "Columns | Mapping[str, str | None] | None" = None,
    separator: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    data_dir: str | os.PathLike[str] = _DATA,
  ) -> "Dataset":
    """Makes a data set from a table with a row for each query: its text, its labels, and optionally more.

    Args:
      data: A file or folder of CSV, TSV, JSON lines, Parquet or Arrow, or a table in memory: a list of dicts, a
        pyarrow.Table, a pandas DataFrame or a Hugging Face Dataset. `vixml_jax.tables.write_raw_folder` describes the
        columns.
      labels: Table of the labels; None if the names in `data` are all that is known about them.
      test: Table of the test queries; None to take a share of `data`.
      columns: Names of the columns, if they are not found by names and contents.
      separator: What separates the labels in a text, such as "|".
      test_fraction: Share of the rows that become test queries.
      seed: Seed of their choice.
      data_dir: Folder in which the data set gets a folder of its own, named by a hash of the table and the settings; or
        the URL of one in a bucket.

    Raises:
      InputError: The table cannot be used; the message names the row or the column.

    Examples:
      >>> table = [{"text": "red wool socks", "labels": ["socks", "red"]}, {"text": "rain boots", "labels": ["boots"]}]
      >>> Dataset.from_table(table).num_labels
      3
    """
    from vixml_jax.tables import convert_shared  # Late, since the readers of tables take time to import.

    _, converted, folder = convert_shared(
      data_dir,
      data,
      labels=labels,
      test=test,
      columns=columns,
      separator=separator,
      test_fraction=test_fraction,
      seed=seed,
    )
    return cls("custom", _place(converted), _place(folder))

  @classmethod
  def from_folder(
    cls, raw_dir: str | os.PathLike[str], *, data_dir: str | os.PathLike[str] | None = None, name: str = "custom"
  ) -> "Dataset":
    """Opens a raw folder with `trn.json.gz`, `tst.json.gz` and `lbl.json.gz`, or the archives of a published set.

    Args:
      raw_dir: The folder, or an archive, or the URL of one in a bucket.
      data_dir: Folder for what is made from the raw files, or its URL. None for a folder of its own in `data/`, or for
        `data/` itself if the set is a published one.
      name: "custom", or the name of a published data set, whose numbers of rows are then checked.

    Raises:
      InputError: The folder or one of its files is missing, or the name is unknown.

    Examples:
      >>> Dataset.from_folder(raw_folder).num_labels
      24
    """
    raw_dir = _place(raw_dir)
    if name not in BUILDERS:
      raise InputError(f"name={name!r}: there is no such data set; choose from {', '.join(BUILDERS)}")
    raw.find_files(_local(raw_dir, ""))
    if data_dir is None:
      data_dir = _DATA
      if name == "custom":
        whole = raw_dir if isinstance(raw_dir, str) else raw_dir.absolute()
        data_dir /= f"{Path(raw_dir).name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}"
    return cls(name, raw_dir, _place(data_dir))

  @classmethod
  def embedded(cls, data_dir: str | os.PathLike[str] = _DATA) -> "Dataset":
    """Opens MM-Icons-9K, the data set in this package: from names and images of icons to their tags.

    Args:
      data_dir: Folder for what is made from it, or its URL in a bucket.

    Examples:
      >>> Dataset.embedded()
      Dataset('mm_icons_9k', queries=17083, test_queries=5646, labels=9527, images=True)
    """
    ((name, folder),) = EMBEDDED.items()
    return cls(name, folder, _place(data_dir))

  @property
  def num_queries(self) -> int:
    """Number of training queries."""
    return self._counts["train"]

  @property
  def num_test_queries(self) -> int:
    """Number of test queries."""
    return self._counts["test"]

  @property
  def num_labels(self) -> int:
    """Number of labels."""
    return self._counts["labels"]

  @property
  def has_images(self) -> bool:
    """Whether the raw files have images."""
    return any(files.images is not None for files in raw.find_files(_local(self.raw_dir, self.data_dir)).values())

  def __repr__(self) -> str:
    return (
      f"Dataset({self.name!r}, queries={self.num_queries}, test_queries={self.num_test_queries}, "
      f"labels={self.num_labels}, images={self.has_images})"
    )

  def queries(self, split: str = "test") -> Iterator[LabeledQuery]:
    """Yields the queries of a split with their labels, in the order of the raw files.

    The set is converted first, if that has not been done.

    Args:
      split: "test" or "train".

    Raises:
      InputError: The raw files are wrong, or the split is unknown.

    Examples:
      >>> first = next(Dataset.from_folder(raw_folder).queries("train"))
      >>> first.query["title"], first.labels[:1]
      ('arrow up pen left', ['label/0'])
    """
    if split not in ("test", "train"):
      raise InputError(f"split={split!r}: must be test or train")
    builder = prepare_shared(self.name, self.raw_dir, self.data_dir)
    batches = Records(builder, "labels").batches()
    uids = TextTable.from_blocks([record.text(("uid",)) for record in batch] for batch in batches)
    for batch in Records(builder, split).batches():
      yield from (_labeled_query(record, uids) for record in batch)

  @functools.cached_property
  def _counts(self) -> dict[str, int]:
    return {
      split: raw_rows.count_rows(files) for split, files in raw.find_files(_local(self.raw_dir, self.data_dir)).items()
    }


def _place(place: str | os.PathLike[str]) -> Path | str:
  """Returns a path, or the URL of a bucket as it is."""
  return str(place) if is_remote(place) else Path(place)


def _local(raw_dir: Path | str, data_dir: Path | str) -> Path:
  """Returns the local folder of raw files."""
  found = local_raw_folder(raw_dir, data_dir)
  assert found is not None
  return Path(found)


def _labeled_query(record: Record, uids: TextTable) -> LabeledQuery:
  query: dict[str, Any] = {key: record.text((key,)) for key in ("uid", "title", "content")}
  images = [image for _, image in record.images()]
  denied = uids.take(record.numbers("filter_ind", np.int32))
  query |= ({"images": images} if images else {}) | ({"deny": denied} if denied else {})
  return LabeledQuery(query, uids.take(record.numbers("target_ind", np.int32)))
