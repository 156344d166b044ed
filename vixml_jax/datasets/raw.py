"""The files of a folder in the raw format of the Extreme Classification Repository: names, checks, hashes.

| file | contents |
|---|---|
| `trn.json.gz`, `tst.json.gz` | a query per line: JSON with `uid`, `title`, `content`, `target_ind`, `target_rel` |
| `lbl.json.gz` | a label per line: JSON with `uid`, `title`, `content` |
| `filter_labels_{train,test}.txt` | lines `row label`: pairs that are removed before scoring |
| `{trn,tst,lbl}_images.parquet` | columns `row`, `slot` (0 to 4) and `png`; the files are optional |

`raw_records` reads the first three kinds of files, `raw_images` the last.

Line `i` of a file is row `i - 1`. The row of a label is its id. A row that cannot be used raises `InputError` with the
file and the line. Unusual values that published data sets are known to contain (empty titles, rows without labels) are
accepted and counted in `raw_records.DataWarnings`.
"""

import dataclasses
from pathlib import Path

from tqdm import tqdm

from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file


@dataclasses.dataclass(frozen=True)
class SplitFiles:
  """Names of the raw files of one split.

  Attributes:
    rows: Queries or labels.
    images: Their images; the file may be absent.
    filter: Pairs of a query and a label to remove before scoring; None for the labels.
  """

  rows: str
  images: str
  filter: str | None


SPLITS = {
  "train": SplitFiles("trn.json.gz", "trn_images.parquet", "filter_labels_train.txt"),
  "test": SplitFiles("tst.json.gz", "tst_images.parquet", "filter_labels_test.txt"),
  "labels": SplitFiles("lbl.json.gz", "lbl_images.parquet", None),
}
_ROW_FILES = ", ".join(files.rows for files in SPLITS.values())


def check_folder(folder: Path) -> None:
  """Checks that a folder has every file that the raw format requires.

  Raises:
    InputError: The folder or a file does not exist.
  """
  if not folder.is_dir():
    raise InputError(f"{folder}: no such folder; set --config.dataset.raw_dir to the folder with {_ROW_FILES}")
  for files in SPLITS.values():
    if not (folder / files.rows).is_file():
      raise InputError(f"{folder / files.rows}: missing; the folder must have {_ROW_FILES}, one JSON object per line")
  for files in SPLITS.values():
    if files.filter and not (folder / files.filter).is_file():
      raise InputError(
        f"{folder / files.filter}: missing; it lists the pairs 'row label' that are removed before scoring: create an "
        "empty file if there are none"
      )


def sha256_of_files(folder: Path) -> dict[str, str]:
  """Returns the sha256 in hex of every raw file in a folder, by file name."""
  names = [name for files in SPLITS.values() for name in (files.rows, files.images, files.filter)]
  paths = [folder / name for name in names if name and (folder / name).is_file()]
  total = sum(path.stat().st_size for path in paths)
  with tqdm(total=total, unit="B", unit_scale=True, desc="hash raw files", disable=None) as bar:
    return {path.name: sha256_of_file(path, bar.update) for path in paths}
