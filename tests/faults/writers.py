"""The writers whose every file operation is disturbed: what they write over, and what the next start must find."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pyarrow.parquet as pq

from tests.helpers.damage import files_of
from tests.helpers.miniature import write_raw_folder, write_tokenizer
from tests.helpers.miniature_runs import load_config
from tests.helpers.search_cases import CHECKPOINT, index_contents, unit
from vixml_jax import datasets
from vixml_jax.datasets.raw import SPLITS
from vixml_jax.datasets.records import Records
from vixml_jax.exporting.export import export
from vixml_jax.files import writing
from vixml_jax.images.decoding import REASONS
from vixml_jax.images.feature_parts import FeaturePart, FeatureParts
from vixml_jax.images.features import load_image_features
from vixml_jax.inference.batch_prediction import predict_file
from vixml_jax.inference.block_runner import BatchFile
from vixml_jax.inference.predictions import PredictionColumns
from vixml_jax.inference.queries import QueryFormat
from vixml_jax.inference.query_files import open_queries
from vixml_jax.input.corpus import load_corpus
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.manifest import MANIFEST, check_folder
from vixml_jax.ragged import Ragged
from vixml_jax.row_files import RowFiles, remove_shares, write_shares
from vixml_jax.run import configuration, provenance
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer, checkpoint_id
from vixml_jax.run.checkpoint_damage import replaced, set_aside
from vixml_jax.run.goodput import Goodput
from vixml_jax.run.saved_model import save_for_inference
from vixml_jax.run.state import TrainState
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.label_index_files import write_index
from vixml_jax.search.snapshots import check_files, read_current
from vixml_jax.tables import write_raw_folder as write_raw_folder_of_table
from vixml_jax.training import metric_writer
from vixml_jax.training.metric_writer import MetricWriter


@dataclasses.dataclass(frozen=True)
class Writer:
  """A writer and the reader that follows it at the next start.

  Attributes:
    start: Makes the state before, in an empty folder.
    write: Writes the next state.
    read: Returns what the next start finds; it may complete the work. It raises where it may not find anything.
    unsynced: Paths within the folder whose contents another library wrote and did not sync.
    may_be_missing: Whether the next start may end with one line that says what to run.
    again: Writes once more after the next start has read, and checks that nothing was left behind.
  """

  start: Callable[[Path], object]
  write: Callable[[Path], object]
  read: Callable[[Path], Any]
  unsynced: tuple[str, ...] = ()
  may_be_missing: bool = False
  again: Callable[[Path], object] = lambda folder: None


# config.json and metrics.jsonl


def _config(every_steps: int) -> ConfigDict:
  config = load_config("custom", "encoder=minilm-l6")
  config.checkpoint.every_steps = every_steps
  return config


def _write_config(every_steps: int) -> Callable[[Path], None]:
  return lambda folder: configuration.write(_config(every_steps), folder / "config.json")


def _read_config(folder: Path) -> int | None:
  path = folder / "config.json"
  return configuration.read(path).checkpoint.every_steps if path.exists() else None


@contextlib.contextmanager
def _without_tensorboard() -> Iterator[None]:
  with mock.patch.object(metric_writer, "TensorboardFile"):
    yield


def _write_metrics(steps: range, first_step: int) -> Callable[[Path], None]:
  def write(folder: Path) -> None:
    with _without_tensorboard(), MetricWriter(folder, first_step) as writer:
      for step in steps:
        writer.write(step, 0, "train", {"loss": 10.0 * first_step + step})
        writer.sync()

  return write


def _read_metrics(folder: Path) -> list[tuple[int, float]]:
  with _without_tensorboard(), MetricWriter(folder, 10**6):
    pass
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["values"]["loss"]) for line in lines]


# goodput.json


def _count_steps(seconds: float) -> Callable[[Path], None]:
  def write(folder: Path) -> None:
    _write_config(10)(folder)
    with mock.patch("vixml_jax.run.goodput.time.monotonic", return_value=0.0), Goodput(folder) as goodput:
      goodput._seconds["steps"] += seconds
      goodput.save()

  return write


def _read_goodput(folder: Path) -> float:
  return Goodput(folder)._seconds["steps"]


# provenance.json


def _record_start(*commands: str) -> Callable[[Path], None]:
  def write(folder: Path) -> None:
    for command in commands:
      with mock.patch("sys.orig_argv", [command]), mock.patch.object(provenance, "describe_environment", dict):
        provenance.record_start(folder, {})

  return write


def _read_commands(folder: Path) -> list[str]:
  return [start["command"] for start in provenance.read_starts(folder)]


# A bank of image features


def _features() -> Any:
  def split(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    lengths = np.array([1, 0, 2])
    yield lengths, np.arange(3 * 4, dtype=np.float16).reshape(3, 4) + len(name)

  rows = dict.fromkeys(("train", "labels", "test"), 3)
  return SimpleNamespace(
    metadata={"dataset": "set", "rows": rows}, dim=4, split=split, builder=SimpleNamespace(data_path="/nonexistent")
  )


def _load_bank(folder: Path) -> list[Any]:
  loaded = load_image_features(_features(), 2, folder / "banks")
  return [np.asarray(loaded.features.values).tolist(), loaded.rows["test"].offsets.tolist()]


def _damaged_bank(folder: Path) -> None:
  _load_bank(folder)
  for path in folder.rglob("values.npy"):
    path.write_bytes(path.read_bytes()[:-3])


# Parts of an extraction


def _part(number: int) -> FeaturePart:
  rows = np.arange(3) + 3 * number
  return FeaturePart(rows, np.zeros(3, np.int32), [None, None, REASONS[0]], np.full((3, 4), number, np.float16))


def _write_parts(folder: Path) -> None:
  parts = FeatureParts(folder / "parts", 4)
  for number in sorted({0, 1, 2} - set(parts.finished("train"))):
    parts.write("train", number, _part(number))


def _read_parts(folder: Path) -> list[list[float]]:
  _write_parts(folder)  # Those that are not finished.
  merged = FeatureParts(folder / "parts", 4).merge("train")
  return [features.tolist() for _, features in merged.rows(0, 9)]


# Shares of embeddings


def _write_embeddings(value: float) -> Callable[[Path], None]:
  def write(folder: Path) -> None:
    remove_shares(folder, "labels")
    write_shares(folder, "labels", 2, [(i, 3 * i, [np.full((3, 2), value + i)]) for i in range(2)], 2)

  return write


def _read_embeddings(folder: Path) -> list[float]:
  return np.asarray(RowFiles(folder, "labels").load())[:, 0].tolist()


# The label index


def _open_index(folder: Path) -> LabelIndex:
  return LabelIndex.open(folder / "index", checkpoint=CHECKPOINT, mesh=_mesh())


def _mesh() -> jax.sharding.Mesh:
  return jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))


def _write_index(num_labels: int) -> Callable[[Path], None]:
  return lambda folder: write_index(
    folder / "index", index_contents(num_labels), checkpoint=CHECKPOINT, search="exact", mesh=_mesh()
  )


def _read_index(folder: Path) -> tuple[int, int, int, list[str]]:
  """Opens the index, which compares every file."""
  index = _open_index(folder)
  assert len(index.texts([0, index.num_labels - 1])) == 2
  return index.num_labels, index.num_live, index._files.info["edits"], index.uids([index.num_labels - 1])


def _write_index_again(folder: Path) -> None:
  _write_index(20)(folder)
  current = (folder / "index" / "CURRENT").read_text().split()[0]
  assert sorted(path.name for path in (folder / "index").iterdir()) == [".lock", current, "CURRENT"]


def _add(folder: Path) -> None:
  _open_index(folder).add(unit(2, 5), ["new a", "new b"], ["n/a", "n/b"], np.zeros(2, np.int32))


# Parts of predict


class _Predictor(SimpleNamespace):
  """Answers each query with labels that depend on its text."""

  def capped_k(self, k: int) -> int:
    return k

  def settings(self) -> dict[str, Any]:
    return {"model": 1}

  def encode(self, queries: Any, **_: Any) -> np.ndarray:
    return np.array([[len(query.text)] for query in queries], np.float32)

  def search(self, embeddings: np.ndarray, k: int, filters: Any, texts: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(embeddings, k, 1), np.tile(np.arange(k, dtype=np.int32), (len(embeddings), 1))

  def filters(self, queries: Any) -> None:
    return None

  def columns(self, scores: np.ndarray, ids: np.ndarray) -> PredictionColumns:
    labels = [(f"u/{i}", i, f"text {i}") for i in range(ids.shape[1])]
    return PredictionColumns(labels, ids.ravel(), scores.ravel(), np.full(len(ids), ids.shape[1]))


def _predict(folder: Path) -> None:
  tokenizer = lambda texts: Ragged.from_rows([[1]] * len(texts))
  predictor = _Predictor(
    index=SimpleNamespace(), encoder=SimpleNamespace(tokenizer=tokenizer), mesh=SimpleNamespace(size=1)
  )
  form = QueryFormat(**_FORM)
  path = folder / "q.jsonl"
  predict_file(predictor, BatchFile(open_queries(path, form), path, 2), str(folder / "out" / "top.jsonl"), k=2)


def _read_predictions(folder: Path) -> bytes:
  _predict(folder)
  assert [path.name for path in sorted((folder / "out").iterdir())] == ["top.jsonl", "top.jsonl.stats.json"]
  return (folder / "out" / "top.jsonl").read_bytes()


def _queries(folder: Path) -> None:
  (folder / "out").mkdir()
  (folder / "q.jsonl").write_text("".join(json.dumps({"title": "x" * n}) + "\n" for n in range(1, 8)))


# A checkpoint, from the moment when Orbax has written its files


def _save_checkpoints(folder: Path) -> None:
  """Saves steps 1 and 2, and step 3 without its hashes and with step 1 still there."""
  steps = folder / "checkpoints"
  with Checkpointer(steps, 3) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(step, Checkpoint(_STATE, None, {"step": step}))
  (steps / "3" / MANIFEST).unlink()


def _complete(folder: Path) -> None:
  with Checkpointer(folder / "checkpoints", 2) as checkpointer:
    checkpointer._complete(3)


def _read_checkpoint(folder: Path) -> tuple[int | None, Any]:
  steps = folder / "checkpoints"
  with Checkpointer(steps, 2) as checkpointer:
    step = checkpointer.step_to_resume()
    return step, checkpointer.meta(step)


def _save_again(folder: Path) -> None:
  steps = folder / "checkpoints"
  with Checkpointer(steps, 2) as checkpointer:
    for step in (3, 4):
      checkpointer.save(step, Checkpoint(_STATE, None, {"step": step}))
    assert checkpointer.step_to_resume() == 4
  assert sorted(path.name for path in steps.iterdir() if path.name.isdigit()) == ["3", "4"]
  assert not list(steps.glob("*.damaged"))


def _save_end_of_epoch(folder: Path) -> None:
  """Saves steps 1 and 2, and step 2 once more beside them, as the end of a run does."""
  for steps, last in ((folder / "checkpoints", False), (folder / "end", True)):
    with Checkpointer(steps, 3) as checkpointer:
      for step in (1, 2):
        checkpointer.save(step, Checkpoint(_STATE, None, {"step": step, "last": last}))
  (folder / "end" / "2" / MANIFEST).unlink()


def _replace(folder: Path) -> None:
  """Does what saving a step again does, in place of Orbax by a rename."""
  step = folder / "checkpoints" / "2"
  with writing(step):
    set_aside(step, replaced(step))
    (folder / "end" / "2").rename(step)
  with Checkpointer(step.parent, 2) as checkpointer:
    checkpointer._complete(2)
  assert not replaced(step).exists()


_STATE = TrainState(*(jnp.arange(3.0) + i for i in range(6)))


# The raw folder of a table


def _convert(folder: Path) -> list[bytes]:
  rows = [{"text": f"text {number}", "labels": [f"label {number % 2}"]} for number in range(4)]
  raw = write_raw_folder_of_table(rows, folder / "table" / "raw").folder
  return [(raw / files.rows).read_bytes() for files in SPLITS.values()]


# A prepared set and its tokens


def _raw(folder: Path) -> None:
  write_raw_folder(folder.parent / "raw", num_train=6, num_test=4, num_labels=4)
  write_tokenizer(folder.parent / "tokenizer")


def _prepare(folder: Path) -> Any:
  return datasets.prepare("custom", folder.parent / "raw", folder / "data")


def _read_prepared(folder: Path) -> list[str]:
  builder = _prepare(folder)
  return [record.text(("title",)) for batch in Records(builder, "train").batches() for record in batch]


def _tokenize(folder: Path) -> list[int]:
  builder = datasets.prepare("custom", folder.parent / "raw", folder.parent / "prepared")
  corpus = load_corpus(builder, Tokenizer(folder.parent / "tokenizer", 8), ("title",), folder / "tokens")
  return np.asarray(corpus.train_tokens.values).tolist()


def _prepare_outside(folder: Path) -> None:
  _raw(folder)
  datasets.prepare("custom", folder.parent / "raw", folder.parent / "prepared")


# An exported folder


def _workdir(folder: Path) -> None:
  workdir = folder.parent / "run"
  with Checkpointer(workdir / "checkpoints", 1) as checkpointer:
    checkpointer.save(3, Checkpoint(_STATE, None, {"step": 3}))
  configuration.write(_config(10), workdir / "config.json")
  write_index(
    workdir / "index", index_contents(12), checkpoint=checkpoint_id(workdir / "checkpoints", 3), search="exact"
  )


def _export(folder: Path) -> None:
  export(folder.parent / "run", "label-vectors", folder / "out")


def _read_export(folder: Path) -> list[str] | None:
  if not (folder / "out").exists():
    return None
  assert pq.read_table(folder / "out" / "labels.parquet").num_rows == 12
  return files_of(folder / "out")


# A model that is saved for inference


def _inference_workdir(folder: Path) -> None:
  _workdir(folder)
  workdir = folder.parent / "run"
  (workdir / "tokenizer").mkdir()
  for name in ("config.json", "inference.json", "tokenizer/tokenizer.json", "final_metrics.json"):
    (workdir / name).write_text("{}")


def _save_model(folder: Path) -> None:
  save_for_inference(folder.parent / "run", 3, folder / "out")


def _read_saved(folder: Path) -> list[str] | None:
  if not (folder / "out").exists():
    return None
  check_folder(folder / "out" / "checkpoints" / "3", "it was damaged", contents=True)
  current = read_current(folder / "out" / "index")
  check_files(current.path, current.info["files"], contents=True)
  return files_of(folder / "out")


_FORM: dict[str, Any] = dict(text_fields=("title",), images=0, feature_dim=0)

_nothing = lambda folder: None

WRITERS: dict[str, Writer] = {
  "config.json, first": Writer(_nothing, _write_config(20), _read_config),
  "config.json, again": Writer(_write_config(10), _write_config(20), _read_config),
  "metrics.jsonl": Writer(_write_metrics(range(1, 6), 0), _write_metrics(range(4, 7), 3), _read_metrics),
  "goodput.json": Writer(_count_steps(1.0), _count_steps(2.0), _read_goodput),
  "provenance.json": Writer(_record_start("a"), _record_start("b"), _read_commands),
  "embeddings": Writer(_write_embeddings(1.0), _write_embeddings(5.0), _read_embeddings, may_be_missing=True),
  "bank of features": Writer(_nothing, _load_bank, _load_bank),
  "bank of features, damaged": Writer(_damaged_bank, _load_bank, _load_bank),
  "parts of features": Writer(_nothing, _write_parts, _read_parts),
  "parts of predict": Writer(_queries, _predict, _read_predictions),
  "label index, write": Writer(_write_index(12), _write_index(14), _read_index, again=_write_index_again),
  "label index, add": Writer(_write_index(12), _add, _read_index, again=_write_index_again),
  "label index, delete": Writer(
    _write_index(12), lambda folder: _open_index(folder).delete([3]), _read_index, again=_write_index_again
  ),
  "checkpoint": Writer(_save_checkpoints, _complete, _read_checkpoint, unsynced=("checkpoints/3",), again=_save_again),
  "checkpoint, saved again": Writer(_save_end_of_epoch, _replace, _read_checkpoint, unsynced=("end/2",)),
  "folder of a table": Writer(_nothing, _convert, _convert),
  "saved model": Writer(_inference_workdir, _save_model, _read_saved),
  "tokens": Writer(_prepare_outside, _tokenize, _tokenize),
  "prepared set": Writer(_raw, _prepare, _read_prepared),
  "export": Writer(_workdir, _export, _read_export),
}
"""Writers by name. The last three also start code of other libraries and take longer."""
