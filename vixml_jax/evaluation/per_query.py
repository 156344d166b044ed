"""Metrics of every query on disk, and of what data they are, so that workdirs can be compared query by query."""

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

FILE = "per_query.npz"


@dataclasses.dataclass(frozen=True)
class PerQuery:
  """What one evaluation found for each query.

  Attributes:
    of: what it was evaluated on (`evaluated_on`); results with the same are of the same queries.
    rows: "plain" and, where it was asked for, "augmented"; they share names, ratios and denominators.
  """

  of: Mapping[str, Any]
  rows: Mapping[str, QueryMetrics]

  def save(self, path: Path) -> None:
    """Writes one npz, whole or not at all: float32 and texts, nothing that needs pickle."""
    plain = self.rows["plain"]
    arrays: dict[str, Any] = {name: row.numerators for name, row in self.rows.items()} | {
      "of": np.array(json.dumps(self.of)),
      "names": np.array(plain.names),
      "ratios": np.array(plain.ratios, np.int64),
      "denominators": plain.denominators,
    }
    with new_file(path) as partial, partial.open("wb") as file:
      np.savez_compressed(file, **arrays)

  @classmethod
  def load(cls, path: Path) -> "PerQuery":
    """Reads what `save` wrote.

    Raises:
      InputError: there is no such file, or it is damaged.
    """
    evaluate_again = f"run python -m vixml_jax.evaluate --workdir={path.parent} first"
    try:
      # numpy leaves open what it opens itself and cannot read.
      with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        names, ratios = tuple(file["names"].tolist()), tuple(file["ratios"].tolist())
        rows = {
          name: QueryMetrics(names, file[name], file["denominators"], ratios)
          for name in ("plain", "augmented")
          if name in file
        }
        return cls(json.loads(str(file["of"])), rows)
    except FileNotFoundError as error:
      raise InputError(f"{path}: not found; {evaluate_again}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      raise InputError(f"{path}: cannot be read ({error}); {evaluate_again}") from error


def evaluated_on(
  builder: tfds.core.DatasetBuilder, split: str, rows: np.ndarray | None, propensity: tuple[float, float]
) -> dict[str, Any]:
  """What must be equal for two results to be of the same queries, scored in the same way.

  Neither the tokens nor the images: models that read other parts of the same queries can be compared.

  Args:
    builder: the prepared data set.
    split: "test" or "validation".
    rows: which rows of the training split are the queries; None for a whole split.
    propensity: A and B of PSP.
  """
  texts = {name: digest for name, digest in builder.info.metadata["sha256"].items() if not name.endswith(".parquet")}
  return {
    "data set": builder.name,
    "raw files": fingerprint_of(texts),
    "split": split,
    "queries": "all" if rows is None else fingerprint_of(rows.tolist()),
    "propensity": list(propensity),
  }
