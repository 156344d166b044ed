"""Workdirs of miniatures that were trained, and whose data sets and pretrained weights are gone."""

from collections.abc import Callable
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq

from tests.helpers.miniature import read_lines, write_raw_folder
from tests.helpers.miniature_runs import load_config, miniature_config, shrink
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.models.siglip import define_siglip
from vixml_jax.weights.siglip import save_npz

# The miniature's images have 8 x 8 pixels, so that nothing is resized.
_TOWER = dict(image_size=8, patch_size=4, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)


@dataclasses.dataclass(frozen=True)
class Trained:
  """A workdir, and what its test queries and labels were.

  Attributes:
    workdir: what training wrote.
    encoder: the pretrained folder; for adapters alone it is still needed.
    queries: of the test split, as `predict` takes them, with the labels of the filter as `deny`.
    positives: label ids of each.
    labels: records of the labels.
    final: final_metrics.json.
  """

  workdir: Path
  encoder: Path
  queries: list[dict]
  positives: list[list[int]]
  labels: list[dict]
  final: dict

  def embeddings(self, name: str) -> np.ndarray:
    return np.load(self.workdir / "embeddings" / f"{name}.npy")


def _once(train: Callable[..., Trained]) -> Callable[..., Trained]:
  """Trains in the first test module that asks."""
  made: list[Trained] = []

  @functools.wraps(train)
  def trained(factory):
    if not made:
      made.append(train(factory))
    return made[0]

  return trained


@_once
def texts_only(factory) -> Trained:
  """MiniLM on titles; lambda and temperature are chosen on held-out queries."""
  config = miniature_config(factory.mktemp("texts_only") / "place")
  config.train.epochs, config.dataset.validation_fraction = 1, 0.2
  config.eval.retrieval_choose = True
  return _train(config)


@_once
def with_images(factory) -> Trained:
  """MiniLM on titles, contents and up to two images, whose features a tiny SigLIP tower makes."""
  place = factory.mktemp("with_images") / "place"
  config = shrink(
    load_config("custom", "encoder=minilm-l6"), place, write_raw_folder(place / "raw", num_train=24, images=True)
  )
  rng = np.random.default_rng(0)
  tower = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), define_siglip(_TOWER)[1])
  save_npz(tower, place.parent / "tower.npz")
  config.dataset.text_fields = ("title", "content")
  config.dataset.max_length, config.train.epochs, config.images = 20, 1, 2
  config.features.update(dict(name="tiny", dim=8, checkpoint=str(place.parent / "tower.npz")))
  return _train(config, images=True)


@_once
def adapters(factory) -> Trained:
  """A tiny Qwen2 that was frozen, with adapters."""
  config = miniature_config(factory.mktemp("adapters") / "place", "qwen2.5-0.5b", num_train=24)
  config.train.epochs = 1
  return _train(config)


def _train(config, images: bool = False) -> Trained:
  """Trains, remembers the test split, and moves away what inference must not need."""
  encoder, raw = Path(config.encoder.pretrained), Path(config.dataset.raw_dir)
  place, workdir = raw.parent, raw.parent.parent / "run"
  train_and_evaluate(config, workdir)
  records, labels = read_lines(raw / "tst.json.gz"), read_lines(raw / "lbl.json.gz")
  queries = [{key: record[key] for key in ("uid", "title", "content")} for record in records]
  for line in (raw / "filter_labels_test.txt").read_text().splitlines():
    row, label = map(int, line.split())
    queries[row].setdefault("deny", []).append(labels[label]["uid"])
  if images:
    for picture in pq.read_table(raw / "tst_images.parquet").to_pylist():
      queries[picture["row"]].setdefault("images", []).append(picture["png"])
  place.rename(place.with_name("gone"))
  return Trained(
    workdir,
    place.with_name("gone") / encoder.name,
    queries,
    [record["target_ind"] for record in records],
    labels,
    json.loads((workdir / "final_metrics.json").read_text()),
  )
