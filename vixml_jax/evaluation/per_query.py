"""Stores the metrics of each query and a description of the data, so that workdirs can be compared query by query."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any
import zipfile
import zlib

import numpy as np
import tensorflow_datasets as tfds

from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import QueryMetrics
from vixml_jax.files import fingerprint_of, new_file


@dataclasses.dataclass(frozen=True)
class PerQuery:
  """The results of an evaluation for each query.

  Attributes:
    description: Description of the queries (`describe_queries`). If the descriptions of two results are equal, their
      queries are the same.
    rows: Metrics of the row "plain" and, where they were evaluated, "augmented" and "blend". All rows have the same
      names, ratios and denominators.
  """

  description: Mapping[str, Any]
  rows: Mapping[str, QueryMetrics]

  def save(self, path: Path) -> None:
    """Writes an .npz file of numbers and texts as a whole or not at all; pickle is not used."""
    plain = self.rows["plain"]
    arrays: dict[str, Any] = {name: row.numerators for name, row in self.rows.items()} | {
      "of": np.array(json.dumps(self.description)),
      "names": np.array(plain.names),
      "ratios": np.array(plain.ratios, np.int64),
      "denominators": plain.denominators,
    }
    with new_file(path) as partial, partial.open("wb") as file:
      np.savez_compressed(file, **arrays)

  @classmethod
  def load(cls, path: Path) -> "PerQuery":
    """Reads a file that `save` has written.

    Raises:
      InputError: If the file is missing or damaged.
    """
    evaluate_again = f"run python -m vixml_jax.evaluate --workdir={path.parent} first"
    try:
      # The file is opened here because numpy does not close a file that it fails to read.
      with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        names, ratios = tuple(file["names"].tolist()), tuple(file["ratios"].tolist())
        rows = {
          name: QueryMetrics(names, file[name], file["denominators"], ratios)
          for name in ("plain", "augmented", "blend")
          if name in file
        }
        return cls(json.loads(str(file["of"])), rows)
    except FileNotFoundError as error:
      raise InputError(f"{path}: not found; {evaluate_again}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      raise InputError(f"{path}: cannot be read ({error}); {evaluate_again}") from error


def describe_queries(
  builder: tfds.core.DatasetBuilder, split: str, rows: np.ndarray | None, propensity: tuple[float, float]
) -> dict[str, Any]:
  """Returns a description of evaluated queries, which is equal for results that can be compared query by query.

  It contains neither tokens nor images, so models that read different parts of the same queries can be compared.

  Args:
    builder: The prepared data set.
    split: "test" or "validation".
    rows: Rows of the training split that are the queries; None for a whole split.
    propensity: Constants A and B of the propensity in PSP.
  """
  texts = {name: digest for name, digest in builder.info.metadata["sha256"].items() if not name.endswith(".parquet")}
  return {
    "data set": builder.name,
    "raw files": fingerprint_of(texts),
    "split": split,
    "queries": "all" if rows is None else fingerprint_of(rows.tolist()),
    "propensity": list(propensity),
  }
