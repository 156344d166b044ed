"""The files of a data set in the raw format of the Extreme Classification Repository: names, places, hashes.

| file | contents |
|---|---|
| `trn.json.gz`, `tst.json.gz` | a query per line: JSON with `uid`, `title`, `content`, `target_ind`, `target_rel` |
| `lbl.json.gz` | a label per line: JSON with `uid`, `title`, `content` |
| `{train,test,label}.raw.txt` | instead of these three: lines `uid->title` in latin-1 |
| `{trn,tst}_X_Y.txt` | with `*.raw.txt`: a header `rows labels`, then lines `label:relevance ...`, a query each |
| `filter_labels_{train,test}.txt` | lines `row label`: pairs that are removed before scoring; optional |
| `{trn,tst,lbl}_images.parquet` | columns `row`, `slot` (0 to 4) and `png`; the files are optional |

The files are in one folder, in folders below it, or in .zip and .tar.gz archives in it; see `find_files`. `raw_records`
reads `*.json.gz` and filter files, `raw_text` reads the other text files, `raw_images` reads parquet files. `filters`
makes filters where there are no filter files.

Line `i` of a file is row `i - 1`. The row of a label is its id. A row that cannot be used raises `InputError` with the
file and the line. Unusual values that published data sets are known to contain (empty titles, rows without labels) are
accepted and counted in `raw_records.DataWarnings`.
"""

import dataclasses
from pathlib import Path

from vixml_jax.datasets import archives
from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_stream
from vixml_jax.stages import stage

RawFile = Path | archives.Member
"""A file on disk or in an archive."""


@dataclasses.dataclass(frozen=True)
class SplitFiles:
  """Names of the raw files of one split.

  Attributes:
    rows: Queries or labels.
    images: Their images; the file may be absent.
    filter: Pairs of a query and a label to remove before scoring; None for the labels.
    text: Queries or labels as text, instead of `rows`.
    targets: Positives of the queries in `text`; None for the labels.
  """

  rows: str
  images: str
  filter: str | None
  text: str
  targets: str | None


SPLITS = {
  "train": SplitFiles("trn.json.gz", "trn_images.parquet", "filter_labels_train.txt", "train.raw.txt", "trn_X_Y.txt"),
  "test": SplitFiles("tst.json.gz", "tst_images.parquet", "filter_labels_test.txt", "test.raw.txt", "tst_X_Y.txt"),
  "labels": SplitFiles("lbl.json.gz", "lbl_images.parquet", None, "label.raw.txt", None),
}


@dataclasses.dataclass(frozen=True)
class FoundFiles:
  """The raw files of one split that exist.

  Attributes:
    rows: Queries or labels: `*.json.gz`, or `*.raw.txt` if there are targets or the labels are text.
    targets: Positives of queries in text; None if `rows` has them.
    images: Their images, if any.
    filter: Pairs to remove before scoring; None if there is no file, and for the labels.
  """

  rows: RawFile
  targets: RawFile | None
  images: Path | None
  filter: RawFile | None

  @property
  def is_text(self) -> bool:
    """Whether the rows are lines `uid->title`, not JSON."""
    return self.rows.name in _TEXT


_JSON = tuple(files.rows for files in SPLITS.values())
_TEXT = tuple(name for files in SPLITS.values() for name in (files.text, files.targets) if name)
_IMAGES = tuple(files.images for files in SPLITS.values())
_FILTERS = tuple(files.filter for files in SPLITS.values() if files.filter)
_ALL = frozenset((*_JSON, *_TEXT, *_IMAGES, *_FILTERS))
_INNER = ("raw_data", "raw_text")  # Folders in which published archives keep some of the files.
_SET_RAW_DIR = "set --config.dataset.raw_dir to"

_Place = dict[str, RawFile]


def is_raw(path: Path) -> bool:
  """Returns whether a path is an archive, or a folder with rows in the raw format in it or in a folder below it."""
  return archives.is_archive(path) or (
    path.is_dir() and any(map(_has_rows, map(_folder_place, (path, *filter(Path.is_dir, path.iterdir())))))
  )


def find_files(raw_dir: Path) -> dict[str, FoundFiles]:
  """Finds the raw files of every split.

  Rows are taken from the folder itself (with its folders `raw_data` and `raw_text`); if it has none, from the one
  folder in it that has some; if there is none either, from the one archive in it that has some. Filter files come from
  the same place; if it has none, from another folder or archive that has filter files and no rows. So the archives of
  raw texts and of bag-of-words features of a data set can lie next to each other, packed or unpacked.

  Args:
    raw_dir: Folder, or a .zip or .tar.gz archive.

  Returns:
    The files of `train`, `test` and `labels`.

  Raises:
    InputError: The folder or a required file does not exist, two places have the same file, or an archive cannot be
      read.
  """
  tiers = _Tiers(raw_dir)
  rows = tiers.rows()
  filters = tiers.filters(rows)
  if filters and len(filters) < len(_FILTERS):
    (missing,), (found,) = (set(_FILTERS) - filters.keys()), filters.values()
    raise InputError(
      f"{raw_dir / missing}: missing, but there is {found}; add the file, or remove the other one so that both filters "
      "are made from the uids"
    )
  names = _row_names(raw_dir, rows)
  return {
    split: FoundFiles(
      rows=rows[row_name],
      targets=rows[target_name] if target_name else None,
      images=_images(rows.get(SPLITS[split].images)),
      filter=filters.get(SPLITS[split].filter or ""),
    )
    for split, (row_name, target_name) in names.items()
  }


def sha256_of_files(files: dict[str, FoundFiles]) -> dict[str, str]:
  """Returns the sha256 in hex of every raw file, by file name without folder or archive."""
  found = [file for split in files.values() for file in (split.rows, split.targets, split.images, split.filter) if file]
  total = sum(file.size if isinstance(file, archives.Member) else file.stat().st_size for file in found)
  hashes = {}
  with stage("hash raw files", total=total, unit="B", logged=False) as progress:
    for file in found:
      with file.open("rb") as stream:
        hashes[file.name] = sha256_of_stream(stream, progress.advance)
  return hashes


class _Tiers:
  """The places where raw files can be: the folder, the folders in it, the archives in it. Archives are read last."""

  def __init__(self, raw_dir: Path):
    self._raw_dir = raw_dir
    self._archives: dict[str, _Place] | None = None
    if archives.is_archive(raw_dir):
      self._top: _Place = {}
      self._folders: dict[str, _Place] = {}
      self._archive_paths = [raw_dir]
      return
    if not raw_dir.is_dir():
      what = "is not a folder or a .zip or .tar.gz archive" if raw_dir.exists() else "no such folder"
      raise InputError(f"{raw_dir}: {what}; {_SET_RAW_DIR} the folder with {', '.join(_JSON)}")
    entries = sorted(raw_dir.iterdir())
    self._top = _folder_place(raw_dir)
    folders = {str(path): _folder_place(path) for path in entries if path.is_dir() and path.name not in _INNER}
    self._folders = {path: place for path, place in folders.items() if place}
    self._archive_paths = [path for path in entries if archives.is_archive(path)]

  def _in_archives(self) -> dict[str, _Place]:
    """Returns the raw files of each archive that has some; reads the archives at the first call."""
    if self._archives is None:
      places = {str(path): _Place(archives.find_members(path, _ALL)) for path in self._archive_paths}
      self._archives = {path: place for path, place in places.items() if place}
    return self._archives

  def rows(self) -> _Place:
    """Returns the place of the rows."""
    if _has_rows(self._top):
      return self._top
    for places in (self._folders, self._in_archives()):
      found = {path: place for path, place in places.items() if _has_rows(place)}
      if len(found) > 1:
        raise InputError(f"{self._raw_dir}: rows are in {' and in '.join(found)}; {_SET_RAW_DIR} one of them")
      if found:
        return next(iter(found.values()))
    raise InputError(
      f"{self._raw_dir / _JSON[0]}: missing; the folder, or an archive in it, must have {', '.join(_JSON)}, one JSON "
      f"object per line (or {', '.join(_TEXT)})"
    )

  def filters(self, rows: _Place) -> _Place:
    """Returns the filter files that belong to the rows; empty if there are none."""
    own = _filters_of(rows)
    if own:
      return own
    for places in ({str(self._raw_dir): self._top}, self._folders, self._in_archives()):
      found = {path: _filters_of(place) for path, place in places.items() if not _has_rows(place)}
      found = {path: place for path, place in found.items() if place}
      if len(found) > 1:
        raise InputError(f"{self._raw_dir}: filter files are in {' and in '.join(found)}; keep one of them")
      if found:
        return next(iter(found.values()))
    return {}


def _folder_place(folder: Path) -> _Place:
  """Returns the raw files of a folder; those in itself come before those in its inner folders."""
  place: _Place = {}
  for where in (folder, *(folder / inner for inner in _INNER)):
    for name in sorted(_ALL - place.keys()):
      if (where / name).is_file():
        place[name] = where / name
  return place


def _has_rows(place: _Place) -> bool:
  return any(name in place for name in (*_JSON, *(files.text for files in SPLITS.values())))


def _filters_of(place: _Place) -> _Place:
  return {name: place[name] for name in _FILTERS if name in place}


def _row_names(raw_dir: Path, place: _Place) -> dict[str, tuple[str, str | None]]:
  """Returns the names of rows and targets of each split. Where a place has both formats, JSON is read."""
  has_json = any(name in place for name in _JSON)
  if has_json and not (all(name in place for name in _TEXT) and any(name not in place for name in _JSON)):
    required, formats = _JSON, "one JSON object per line"
    names: dict[str, tuple[str, str | None]] = {split: (files.rows, None) for split, files in SPLITS.items()}
  else:
    required, formats = _TEXT, "with lines 'uid->title' and the positives"
    names = {split: (files.text, files.targets) for split, files in SPLITS.items()}
  for name in required:
    if name not in place:
      somewhere = next(file for key, file in place.items() if key in required)
      folder = somewhere.archive if isinstance(somewhere, archives.Member) else somewhere.parent
      raise InputError(f"{folder / name}: missing; the folder must have {', '.join(required)}, {formats}")
  return names


def _images(file: RawFile | None) -> Path | None:
  if isinstance(file, archives.Member):
    raise InputError(f"{file}: images are not read from archives; unpack it and {_SET_RAW_DIR} the folder")
  return file
