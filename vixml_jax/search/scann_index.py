"""Approximate maximum inner product search on the CPU with ScaNN, an optional package."""

import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path
import platform
from typing import Any

import jax
import numpy as np

from vixml_jax.errors import InputError, install_command

_BRUTE_FORCE_BELOW = 20_000
_TREE_FROM = 100_000
_TRAINING_SAMPLE = 250_000
_DIMENSIONS_PER_BLOCK = 2
_UPSERT_BATCH = 256
_CPU_FLAGS = ("avx", "fma")  # The published wheels for x86 need these.


def scann_available() -> tuple[bool, str]:
  """Returns (True, "") if ScaNN can run here, else (False, the reason in words), without importing it.

  On a CPU without AVX, the x86 wheels kill the process, which no exception handler can prevent; so the flags of the CPU
  are checked first.
  """
  if importlib.util.find_spec("scann") is None:
    return False, f"the package scann is not installed: {install_command('scann')}"
  missing = [flag.upper() for flag in _CPU_FLAGS if flag not in _cpu_flags()]
  if missing:
    return False, f"this CPU lacks {' and '.join(missing)}, which ScaNN needs: use search=exact"
  return True, ""


@dataclasses.dataclass(frozen=True)
class ScannParameters:
  """Parameters that ScaNN is built with.

  Attributes:
    leaves: Number of leaves of the partitioning tree; 0 for no tree.
    leaves_to_search: Number of leaves that a query visits.
    reorder: Number of candidates of highest quantized score whose exact scores are computed; 0 for brute force without
      quantization.
    dimensions_per_block: Number of dimensions that share a 4-bit code.
    soar: Whether every label is assigned to a second leaf (SOAR, orthogonality-amplified residuals).
    bfloat16: Whether the exact vectors are stored in bfloat16, which limits the precision of their scores.
  """

  leaves: int
  leaves_to_search: int
  reorder: int
  dimensions_per_block: int
  soar: bool
  bfloat16: bool


def choose_parameters(num_labels: int, k: int = 100) -> ScannParameters:
  """Returns parameters by the rules of thumb of ScaNN's docs/algorithms.md.

  They are brute force below 20K labels, quantized scores with reordering below 100K, and a tree of about sqrt(L) leaves
  above. Three choices are ours: a quarter of the leaves is searched, which recall at 100 needs; 5 k candidates are
  reordered; and with a million labels or more, vectors are stored in bfloat16 to halve memory.

  Args:
    num_labels: Number of labels L.
    k: Largest number of results per query.
  """
  tree = num_labels >= _TREE_FROM
  leaves = round(math.sqrt(num_labels)) if tree else 0
  return ScannParameters(
    leaves=leaves,
    leaves_to_search=math.ceil(leaves / 4),
    reorder=0 if num_labels < _BRUTE_FORCE_BELOW else 5 * k,
    dimensions_per_block=_DIMENSIONS_PER_BLOCK,
    soar=tree,
    bfloat16=num_labels >= 1_000_000,
  )


class ScannIndex:
  """ScaNN over label embeddings, in the memory of this process, searched with all CPUs.

  Labels can be added and deleted. ScaNN numbers its labels by position and moves the last one to the position of a
  deleted one; this class keeps the id of the label at each position. ScaNN's own names for labels (docids) are not
  used, because it saves them with pickle.

  ScaNN 1.4.2 corrupts its memory when a label that SOAR assigned to a second leaf is deleted or changed. With SOAR,
  deleted labels therefore remain in ScaNN and are dropped from its results.

  New labels are assigned to the leaves and codes that were trained on the first ones; `needs_rebuild` says when the
  index should be rebuilt. (ScaNN's `rebalance` also trains in full, but keeps the number of leaves and the deleted
  labels that remain because of SOAR.)

  Attributes:
    parameters: Parameters of the index. Replacing `leaves_to_search` or `reorder` changes the next searches.
  """

  def __init__(
    self,
    embeddings: np.ndarray | jax.Array,
    *,
    rows: np.ndarray | None = None,
    k: int = 100,
    parameters: ScannParameters | None = None,
  ):
    """Builds the index, which takes about a minute for 131K labels of 384 dimensions.

    Args:
      embeddings: Label embeddings [L, D], addressable by this process; ScaNN makes a float32 copy.
      rows: Ids of the labels to search; None searches all labels.
      k: Largest number of results per query that loses no recall.
      parameters: Parameters of ScaNN; None uses those of `choose_parameters`.

    Raises:
      InputError: ScaNN is not installed or cannot run on this CPU, or there is no label.
    """
    rows = np.arange(len(embeddings)) if rows is None else rows
    if embeddings.ndim != 2 or len(rows) == 0:
      raise InputError(
        f"{len(rows)} label embeddings of shape {embeddings.shape}: search needs [L, D] with L at least 1"
      )
    _import_scann()
    self.parameters = parameters or choose_parameters(len(rows), k)
    embeddings = np.asarray(embeddings if len(rows) == len(embeddings) else embeddings[rows], np.float32)
    self._searcher = _build(embeddings, self.parameters, k)
    self._label_at = np.asarray(rows, np.int32)  # Label id at each position; -1 if it was deleted but remains in ScaNN.
    self._num_built, self._num_changed = len(rows), 0

  @property
  def num_labels(self) -> int:
    """Number of labels that are searched, without deleted ones."""
    return int(np.sum(self._label_at >= 0))

  @property
  def needs_rebuild(self) -> bool:
    """Whether the index should be rebuilt, because more than a tenth of its labels were added or deleted since then."""
    return self._num_changed > self._num_built / 10

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns approximately the k labels of highest inner product.

    If e deleted labels remain in ScaNN, queries that find fewer than k others search for twice as many labels, up to
    k + e. ScaNN lists its results by score, so a longer list begins with the same labels.

    Args:
      queries: Queries [Q, D].
      k: Number of labels to return for each query, at least 1.

    Returns:
      Scores float32 [Q, K] in descending order and ids int32 [Q, K]. Score -inf and id -1 fill the places of a
      query for which fewer labels were found.
    """
    queries = np.asarray(queries, np.float32)
    scores, ids = self._search(queries, k, k)
    num_labels = self.num_labels
    width, widest = k, k + len(self._label_at) - num_labels
    while width < widest:
      short = np.flatnonzero((ids >= 0).sum(axis=1) < min(k, num_labels))
      width = min(2 * width, widest)
      scores[short], ids[short] = self._search(queries[short], k, width)
    return scores, ids

  def add(self, embeddings: np.ndarray, ids: np.ndarray) -> None:
    """Adds labels, in about 0.01 ms each.

    Args:
      embeddings: Embeddings [n, D] of the new labels.
      ids: int [n], ids of the new labels, none of which is in the index.
    """
    places = self._searcher.searcher.upsert(
      [None] * len(ids), np.ascontiguousarray(embeddings, np.float32), _UPSERT_BATCH
    )
    expected = np.arange(len(self._label_at), len(self._label_at) + len(ids))
    if not np.array_equal(places, expected):
      raise RuntimeError("ScaNN did not append the new labels; this version of ScaNN is not supported")
    self._label_at = np.concatenate([self._label_at, np.asarray(ids, np.int32)])
    self._num_changed += len(ids)

  def delete(self, ids: np.ndarray) -> None:
    """Deletes labels; ids that are not in the index are ignored."""
    places = np.flatnonzero(np.isin(self._label_at, ids))
    self._num_changed += len(places)
    if self.parameters.soar:
      self._label_at[places] = -1
      return
    # From the last position to the first, so that a label that is moved is never one to be deleted.
    places = places[::-1]
    self._searcher.searcher.delete(places.tolist())
    for place in places:
      self._label_at[place] = self._label_at[-1]
      self._label_at = self._label_at[:-1]

  def save(self, folder: Path) -> None:
    """Writes the index to an empty folder, which can be moved."""
    self._searcher.serialize(str(folder), relative_path=True)
    np.save(folder / "slots.npy", self._label_at)
    state = {
      "parameters": dataclasses.asdict(self.parameters),
      "built_on": self._num_built,
      "changed": self._num_changed,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

  @classmethod
  def load(cls, folder: Path) -> "ScannIndex":
    """Reads an index that `save` wrote.

    Raises:
      InputError: ScaNN is not installed or cannot run on this CPU, or the folder was not written by `save`.
    """
    scann = _import_scann()
    if (folder / "scann_docids.pkl").exists():
      raise InputError(
        f"{folder}: contains scann_docids.pkl, which this package never writes and ScaNN would unpickle; write the "
        "label index again"
      )
    index = cls.__new__(cls)
    try:
      state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
      index.parameters = ScannParameters(**state["parameters"])
      index._num_built, index._num_changed = state["built_on"], state["changed"]
      index._label_at = np.load(folder / "slots.npy", allow_pickle=False)
      index._searcher = scann.scann_ops_pybind.load_searcher(str(folder.resolve()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
      raise InputError(
        f"{folder}: cannot be read as an index of ScaNN ({error}); write the label index again"
      ) from error
    if index._searcher.size() != len(index._label_at):
      raise InputError(
        f"{folder}: ScaNN has {index._searcher.size()} labels but slots.npy has {len(index._label_at)}; "
        "write the label index again"
      )
    return index

  def _search(self, queries: np.ndarray, k: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and ids of the k best among the `width` best, without deleted labels."""
    scores = np.full((len(queries), width), -np.inf, np.float32)
    ids = np.full((len(queries), width), -1, np.int32)
    if len(queries):
      reach = min(width, len(self._label_at))
      reorder = max(self.parameters.reorder, reach) if self.parameters.reorder else None
      places, found = self._searcher.search_batched_parallel(
        queries,
        final_num_neighbors=reach,
        pre_reorder_num_neighbors=reorder,
        leaves_to_search=self.parameters.leaves_to_search or None,
      )
      real = ~np.isnan(found)  # ScaNN fills the places that it has no label for with NaN.
      ids[:, :reach] = np.where(real, self._label_at[np.where(real, places, 0)], -1)
      scores[:, :reach] = np.where(ids[:, :reach] >= 0, found, -np.inf)
    kept = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)


def _import_scann() -> Any:
  """Returns the package scann, which is optional and slow to import.

  Raises:
    InputError: It is not installed or cannot run here.
  """
  available, reason = scann_available()
  if not available:
    raise InputError(f"search=scann cannot be used: {reason}")
  try:
    import scann
  except ImportError as error:
    raise InputError(
      f"search=scann cannot be used: the package scann does not load ({error}); "
      f"install it again: {install_command('scann')}"
    ) from error
  return scann


def _build(embeddings: np.ndarray, parameters: ScannParameters, k: int) -> Any:
  """Returns a searcher of ScaNN over embeddings [L, D]."""
  scann = _import_scann()
  num_labels = len(embeddings)
  sample = min(num_labels, _TRAINING_SAMPLE)
  builder = scann.scann_ops_pybind.builder(embeddings, min(k, num_labels), "dot_product")
  builder = builder.set_n_training_threads(os.cpu_count() or 1)
  if parameters.leaves:
    spilling = {"soar_lambda": 1.5, "overretrieve_factor": 2.0} if parameters.soar else {}
    builder = builder.tree(
      num_leaves=parameters.leaves,
      num_leaves_to_search=parameters.leaves_to_search,
      training_sample_size=sample,
      **spilling,
    )
  if not parameters.reorder:
    return builder.score_brute_force().build()
  builder = builder.score_ah(
    parameters.dimensions_per_block, anisotropic_quantization_threshold=0.2, training_sample_size=sample
  )
  quantize = scann.ReorderType.BFLOAT16 if parameters.bfloat16 else scann.ReorderType.FLOAT32
  return builder.reorder(min(parameters.reorder, num_labels), quantize=quantize).build()


def _cpu_flags() -> frozenset[str]:
  """Returns the instruction sets of the CPU that Linux lists; if it lists none, all that ScaNN needs."""
  if platform.machine().lower() not in ("x86_64", "amd64"):
    return frozenset(_CPU_FLAGS)
  try:
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
      flags = next((line for line in lines if line.startswith("flags")), None)
  except OSError:
    flags = None
  return frozenset(flags.split(":", 1)[1].split() if flags else _CPU_FLAGS)
