"""Checkpoints with Orbax: train state, mining state, config and provenance, saved and restored together.

When a step is on disk, the sha256 of each of its files is written into it (`checkpoint_damage`). A step is used only if
its files have these hashes; otherwise the newest one before it is.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from vixml_jax import sharding, stopping
from vixml_jax.errors import InputError
from vixml_jax.files import make_folder, remove_folder, sha256_of_file, sync_folder, writing
from vixml_jax.manifest import MANIFEST, read_manifest, write_manifest
from vixml_jax.run.checkpoint_arrays import restore_item, restore_items, restoring
from vixml_jax.run.checkpoint_damage import HASHED, aside, newest_whole_step, put_back_replaced, replaced, set_aside
from vixml_jax.run.environment import package_versions
from vixml_jax.run.state import TrainState, model_part
from vixml_jax.typing import Tree

# Orbax collects this many bytes before it writes them to a file. With its default of 2 GB, several times as much is in
# memory while a large state is saved.
_FILE_BYTES = 2**28
_MODEL_ITEMS = ("model", "meta")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Everything that a run needs to continue as if it had never stopped.

  Attributes:
    state: state on the devices.
    query_clusters: int32 [N], the clusters that order the epochs; None before the first clustering.
    meta: JSON object: config, provenance, seconds and tokens trained.
  """

  state: TrainState
  query_clusters: np.ndarray | None
  meta: dict[str, Any]


def provenance(data_fingerprint: str, weights_sha256: dict[str, str]) -> dict[str, Any]:
  """Returns package versions, and the fingerprints of the data and the pretrained weights."""
  return {"packages": package_versions(), "data_fingerprint": data_fingerprint, "weights_sha256": weights_sha256}


class Checkpointer:
  """Saves checkpoints (asynchronously, except on CPUs), keeps the newest ones, and restores onto any mesh.

  A step has the items `model` (parameters, centroids, label clusters: all that inference needs), `training`
  (optimizer state, bank, step), `mining` (query clusters) and `meta`. An older step is removed only when the newest one
  has its hashes.

  Args:
    directory: folder of all checkpoints.
    keep: number of checkpoints to keep.
    saved: called in the first process when a step has its hashes and older ones are removed; the next save waits.
  """

  def __init__(self, directory: Path, keep: int, saved: Callable[[], object] = lambda: None):
    if jax.process_index() == 0:
      with writing(directory):
        make_folder(directory.absolute())
    options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
    self._keep, self._saved = keep, saved
    self._background = ThreadPoolExecutor(1, "checkpoint hashes")
    self._completing: Future[None] | None = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
    """Waits until everything is on disk."""
    failed = True
    try:
      self.wait()
      failed = kind is not None
    finally:
      self._background.shutdown()
      # After an error, Orbax raises that of its last save again.
      with contextlib.suppress(*([Exception] if failed else [])):
        self._manager.close()

  def latest_step(self) -> int | None:
    """Returns the newest step that was saved."""
    return self._manager.latest_step()

  def newest_whole_step(self) -> int | None:
    """Returns the newest step whose model is whole; see `checkpoint_damage.newest_whole_step`."""
    return newest_whole_step(self._folder, self._manager.all_steps(), _MODEL_ITEMS)

  def step_to_resume(self) -> int | None:
    """Returns the newest step that is whole; newer ones are renamed, since the run will save them again.

    Returns:
      None if no checkpoint was saved whole.

    Raises:
      InputError: checkpoints were saved whole, and all are damaged now.
    """
    self._in_first_process(lambda: put_back_replaced(self._folder))
    steps = self._manager.all_steps()
    step = newest_whole_step(self._folder, steps)
    newer = [self._folder / str(each) for each in steps if step is None or each > step]
    if newer:

      def rename() -> None:
        for each in newer:
          set_aside(each, aside(each))

      self._in_first_process(rename)
    return step

  def _in_first_process(self, rename: Callable[[], object]) -> None:
    """Renames steps in the first process; all processes call this."""
    if jax.process_index() == 0:
      rename()
    sharding.wait_for_all_processes("checkpoints renamed")
    self._manager.reload()

  def last_saved(self) -> int | None:
    """Waits until everything is on disk and returns the newest step."""
    self.wait()
    return self.latest_step()

  def reached_preemption(self, step: int) -> bool:
    """Returns whether the scheduler asked the processes of this run to stop (several processes)."""
    return self._manager.reached_preemption(step)

  def save(self, step: int, checkpoint: Checkpoint) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    If the step is saved already, the new state replaces it when it is on disk. Until then, a run that is killed
    continues from the old one.

    On CPUs, it returns when everything is on disk: arrays that are being written could not be donated, so the next step
    would need memory for a second state.

    Raises:
      InputError: the disk is full or fails.
    """
    self.wait()
    state, clusters = checkpoint.state, checkpoint.query_clusters
    with writing(self._folder / str(step)):
      if step in self._manager.all_steps():
        self._in_first_process(lambda: set_aside(self._folder / str(step), replaced(self._folder / str(step))))
      self._manager.save(
        step,
        args=ocp.args.Composite(
          model=ocp.args.PyTreeSave(model_part(state), ocdbt_target_data_file_size=_FILE_BYTES),
          training=ocp.args.PyTreeSave(_training_part(state), ocdbt_target_data_file_size=_FILE_BYTES),
          mining=ocp.args.StandardSave({"query_clusters": _no_clusters() if clusters is None else clusters}),
          meta=ocp.args.JsonSave(checkpoint.meta),
        ),
        custom_metadata={HASHED: True},
      )
    stopping.is_saving("checkpoint", True)
    self._completing = self._background.submit(self._complete, step)
    if jax.default_backend() == "cpu":
      self.wait()

  def _complete(self, step: int) -> None:
    """Waits until Orbax has written a step, stores its hashes, and removes the steps that are not kept."""
    folder = self._folder / str(step)
    try:
      with writing(folder):
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
          write_manifest(folder)
          sync_folder(self._folder)  # The name of the step, before the former one loses files.
      stopping.has_saved(f"step {step} is saved")
      if jax.process_index() == 0:
        for former in (aside(folder), replaced(folder)):
          remove_folder(former)
        steps = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        for old in steps[: -self._keep]:
          remove_folder(self._folder / str(old))
        self._saved()
    finally:
      stopping.is_saving("checkpoint", False)

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      InputError: the disk is full or fails.
    """
    completing, self._completing = self._completing, None
    if completing is not None:
      completing.result()

  @property
  def _folder(self) -> Path:
    return Path(self._manager.directory)

  def meta(self, step: int) -> dict[str, Any]:
    """Returns the JSON part of a checkpoint.

    Raises:
      InputError: it cannot be read.
    """
    wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return restoring(self._manager.directory, lambda: self._manager.restore(step, args=wanted)["meta"])

  def restore(self, step: int, abstract: TrainState, num_queries: int) -> Checkpoint:
    """Restores the whole run.

    Args:
      step: the checkpoint's step.
      abstract: shapes and shardings to restore into; the mesh may differ from the one that saved.
      num_queries: N, for the query clusters.

    Raises:
      InputError: the checkpoint does not fit the state, or is damaged.
    """
    directory = Path(self._manager.directory)
    if not any((directory / str(step) / item).exists() for item in ("training", "mining")):
      raise InputError(
        f"{directory.parent}: was saved for inference only, so its training cannot be continued; use another --workdir"
      )
    arrays = restore_items(directory, step, {"model": model_part(abstract), "training": _training_part(abstract)})
    wanted = ocp.args.Composite(mining=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
    rest = restoring(directory, lambda: self._manager.restore(step, args=wanted))
    clusters = np.asarray(rest["mining"]["query_clusters"])
    return Checkpoint(TrainState(**arrays), clusters if len(clusters) == num_queries else None, rest["meta"])

  def restore_model(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters, centroids and label clusters; no optimizer state is read.

    Args:
      step: the checkpoint's step.
      abstract: shapes and shardings to restore into, from `state.abstract_model_part`.

    Raises:
      InputError: the checkpoint does not fit the shapes, or is damaged.
    """
    return restore_item(Path(self._manager.directory), step, "model", abstract)


def newest_checkpoint(directory: Path) -> tuple[int, dict[str, Any]]:
  """Returns step and JSON part of the newest checkpoint whose model is whole; writes nothing.

  Raises:
    InputError: there is no checkpoint, or all are damaged.
  """
  options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
  with _without_warnings(), ocp.CheckpointManager(directory.absolute(), options=options) as manager:
    step = newest_whole_step(directory, manager.all_steps(), _MODEL_ITEMS)
    if step is None:
      raise InputError(f"{directory}: contains no checkpoint; train first")
    meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return step, restoring(directory, lambda: manager.restore(step, args=meta)["meta"])


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
  """Drops the warning of Orbax that a directory is only read."""
  only_errors = lambda record: record.levelno >= logging.ERROR
  logger = logging.getLogger("absl")
  logger.addFilter(only_errors)
  try:
    yield
  finally:
    logger.removeFilter(only_errors)


def restore_params(directory: Path, step: int, abstract: Tree) -> Tree:
  """Returns the trained parameters alone, without the data set and without reading centroids.

  Args:
    directory: folder of all checkpoints.
    step: the checkpoint's step.
    abstract: `jax.ShapeDtypeStruct`s with the shardings to restore into; any mesh.

  Raises:
    InputError: the checkpoint is of another model, or damaged.
  """
  return restore_item(directory, step, "model", {"params": abstract}, partial=True)["params"]


def checkpoint_id(directory: Path, step: int) -> dict[str, Any]:
  """Returns what identifies a checkpoint's model: its step, and a sha256 of the names and bytes of its files.

  Stored hashes are taken where there are any: `newest_checkpoint` has compared them with the files.
  """
  folder = directory / str(step) / "model"
  if (folder.parent / MANIFEST).exists():
    files = read_manifest(folder.parent)
    hashes = {name.removeprefix("model/"): files[name]["sha256"] for name in files if name.startswith("model/")}
  else:
    paths = (path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in paths}
  digest = hashlib.sha256()
  for name in sorted(hashes, key=Path):
    digest.update(f"{name} {hashes[name]}\n".encode())
  return {"step": step, "sha256": digest.hexdigest()}


def _training_part(state: TrainState) -> dict[str, Any]:
  part = {"step": state.step, "opt_state": state.opt_state, "bank": state.bank}
  return part if state.classifiers is None else part | {"classifiers": state.classifiers}


def _no_clusters() -> np.ndarray:
  return np.full(1, -1, np.int32)
