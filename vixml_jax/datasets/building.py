"""Runs a TFDS builder without its prints and downloads, and clears up after one that was killed."""

import contextlib
import io
import os
from pathlib import Path
import shutil

import tensorflow_datasets as tfds


def build(
  builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike, manual_dir: str | os.PathLike | None = None
) -> None:
  """Writes the builder's data set as array_record; its folder appears when all is written.

  Args:
    builder: of a class in this package.
    data_dir: folder for all prepared data.
    manual_dir: folder with the raw files, if the builder reads any.
  """
  config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
  tfds.disable_progress_bar()  # Ours counts toward a known total.
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads.
    builder.download_and_prepare(
      download_dir=Path(data_dir) / "downloads", download_config=config, file_format="array_record"
    )


def remove_leftovers(target: Path) -> None:
  """Removes what a killed build of the folder `target` left; call it under a lock."""
  for folder in target.parent.glob(f"*incomplete*{target.name}*"):
    shutil.rmtree(folder)
