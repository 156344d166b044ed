"""Small workdirs that are trained once per session, and whose data set and pretrained encoder are moved away.

The fixtures `texts_only`, `with_images` and `adapters` of conftest give them to tests. They are shared: a test that
edits a workdir copies it first.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import os
from pathlib import Path
import shutil

import jax
from ml_collections import ConfigDict
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.miniature import read_lines, write_raw_folder
from tests.helpers.miniature_runs import load_config, miniature_config, shrink
from vixml_jax.datasets.raw import SPLITS
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.files import locked
from vixml_jax.models.vision import define_vision
from vixml_jax.row_files import RowFiles
from vixml_jax.weights.siglip import save_npz

# The miniature's images have 8 x 8 pixels, so that nothing is resized.
_TOWER = dict(image_size=8, patch_size=4, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained workdir and the data that it was made from.

  Attributes:
    folder: Folder that holds everything. The data set and the pretrained encoder were in `folder/place` during
      training, and are in `folder/gone` now, so that nothing finds them by the paths of the config.
  """

  folder: Path

  @property
  def workdir(self) -> Path:
    """Folder that training wrote."""
    return self.folder / "run"

  @property
  def encoder(self) -> Path:
    """Folder of the pretrained encoder; inference needs it for a model with adapters."""
    return self.folder / "gone" / "encoder"

  @property
  def raw(self) -> Path:
    """Raw data set."""
    return self.folder / "gone" / "raw"

  @property
  def data(self) -> Path:
    """Prepared data set."""
    return self.folder / "gone" / "data"

  @property
  def tower(self) -> Path:
    """Image tower of `with_images`."""
    return self.folder / "tower.npz"

  @functools.cached_property
  def labels(self) -> list[dict]:
    """Records of the labels."""
    return read_lines(self.raw / SPLITS["labels"].rows)

  @functools.cached_property
  def positives(self) -> list[list[int]]:
    """Label ids of each test query."""
    return [record["target_ind"] for record in read_lines(self.raw / SPLITS["test"].rows)]

  @functools.cached_property
  def queries(self) -> list[dict]:
    """Test queries in the form that `predict` takes; `deny` holds the labels that the filter file excludes."""
    keys = ("uid", "title", "content", "images")
    found = [{key: record[key] for key in keys if key in record} for record in raw_records(self.raw, "test")]
    for line in (self.raw / SPLITS["test"].filter).read_text().splitlines():
      row, label = map(int, line.split())
      found[row].setdefault("deny", []).append(self.labels[label]["uid"])
    return found

  @functools.cached_property
  def final(self) -> dict[str, float]:
    """Values of final_metrics.json."""
    return json.loads((self.workdir / "final_metrics.json").read_text())

  def embeddings(self, name: str) -> np.ndarray:
    """Rows that training wrote to `embeddings/`."""
    return np.asarray(RowFiles(self.workdir / "embeddings", name).load())


def raw_records(folder: Path, split: str) -> list[dict]:
  """Returns the records of a split of a raw folder, with the encoded images of each as `images`."""
  records = read_lines(folder / SPLITS[split].rows)
  if (folder / SPLITS[split].images).exists():
    for image in pq.read_table(folder / SPLITS[split].images).to_pylist():
      records[image["row"]].setdefault("images", []).append(image["png"])
  return records


def _texts_only(place: Path) -> ConfigDict:
  """MiniLM on titles; lambda, temperature and the blend are fitted on held-out queries."""
  config = miniature_config(place)
  config.train.epochs, config.dataset.validation_fraction = 1, 0.2
  config.eval.update(dict(retrieval_choose=True, blend=True))
  return config


def with_tower(place: Path, images: int) -> ConfigDict:
  """Returns the config of MiniLM on titles, contents and images, whose features a tiny SigLIP tower makes."""
  raw = write_raw_folder(place / "raw", num_train=24, images=True)
  config = shrink(load_config("custom", "encoder=minilm-l6"), place, raw)
  rng = np.random.default_rng(0)
  tower = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), define_vision(_TOWER)[1])
  save_npz(tower, place.parent / "tower.npz")
  config.dataset.text_fields = ("title", "content")
  config.dataset.max_length, config.train.epochs, config.images = 20, 1, images
  config.train.new_init = "torch"  # Images count for more in one epoch than with the other initial values.
  config.dataset.validation_fraction = 0.2
  config.features.update(dict(name="tiny", dim=8, checkpoint=str(place.parent / "tower.npz")))
  config.eval.update(dict(baselines=()))
  return config


def _with_images(place: Path) -> ConfigDict:
  """The same with up to two images, and settings of retrieval augmentation that are chosen on held-out queries."""
  config = with_tower(place, images=2)
  config.eval.update(dict(test_images=(0,), retrieval_choose=True, blend=False))
  config.baselines = dict(beaten={"P@1": 12.5})
  return config


def _adapters(place: Path) -> ConfigDict:
  """A tiny frozen Qwen2 with adapters."""
  config = miniature_config(place, "qwen2.5-0.5b", num_train=24)
  config.train.epochs = 1
  return config


CONFIGS: dict[str, Callable[[Path], ConfigDict]] = {
  "texts_only": _texts_only,
  "with_images": _with_images,
  "adapters": _adapters,
}
"""Function that writes the data and returns the config, by name."""


def trained_once(factory: pytest.TempPathFactory, name: str) -> Iterator[Trained]:
  """Trains the workdir `name` of `CONFIGS` unless it exists, and checks at the end that no test changed it.

  Processes of pytest-xdist share one workdir: the first that needs it trains it.
  """
  base = factory.getbasetemp()
  shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  folder = shared / "trained" / name
  with locked(folder.with_suffix(".lock")):
    if not (folder / "gone").exists():
      shutil.rmtree(folder, ignore_errors=True)  # What a failed training left behind.
      train_and_evaluate(CONFIGS[name](folder / "place"), folder / "run")
      (folder / "place").rename(folder / "gone")
  before = _state(folder)
  yield Trained(folder)
  changed = {path for path, _ in before.items() ^ _state(folder).items()}
  assert not changed, f"a test changed the shared workdir {name}: {sorted(map(str, changed))}; copy it first"


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
  """Size and time of change of every file in the workdir and the pretrained encoder."""
  files = [path for part in ("run", "gone/encoder") for path in (folder / part).rglob("*") if path.is_file()]
  return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
