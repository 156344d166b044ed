"""Approximate maximum inner product search on CPU by ScaNN, an optional package."""

import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path
import platform

import jax
import numpy as np

from vixml_jax.errors import InputError

_BRUTE_FORCE_BELOW = 20_000
_TREE_FROM = 100_000
_TRAINING_SAMPLE = 250_000
_DIMENSIONS_PER_BLOCK = 2
_UPSERT_BATCH = 256
_CPU_FLAGS = ("avx", "fma")  # what the published wheels for x86 are compiled for


def scann_available() -> tuple[bool, str]:
  """Whether ScaNN can run here, found out without importing it.

  Its x86 wheels die on a CPU without AVX, which no exception handler sees, so
  the CPU is looked at first.

  Returns:
    (True, "") or (False, the reason in words).
  """
  if importlib.util.find_spec("scann") is None:
    return False, "the package scann is not installed: pip install vixml_jax[scann]"
  missing = [flag.upper() for flag in _CPU_FLAGS if flag not in _cpu_flags()]
  if missing:
    return False, f"this CPU lacks {' and '.join(missing)}, which ScaNN needs: use search=exact"
  return True, ""


@dataclasses.dataclass(frozen=True)
class ScannParameters:
  """What ScaNN is built with.

  Attributes:
    leaves: leaves of the partitioning tree; 0 for no tree.
    leaves_to_search: leaves that a query visits.
    reorder: candidates that are scored again, exactly, by product quantized score; 0 for
      brute force without quantization.
    dimensions_per_block: dimensions that share a 4-bit code.
    soar: spill every label to a second leaf (orthogonality-amplified residuals).
    bfloat16: keep the exact vectors as bfloat16; their scores are then only as exact.
  """

  leaves: int
  leaves_to_search: int
  reorder: int
  dimensions_per_block: int
  soar: bool
  bfloat16: bool


def choose_parameters(num_labels: int, k: int = 100) -> ScannParameters:
  """ScaNN's own rules of thumb (its docs/algorithms.md), by the number of labels.

  Brute force below 20K labels, quantized scores with reordering below 100K, above
  that a tree of about sqrt(L) leaves. Ours on top: a quarter of the leaves is searched, which
  recall at 100 needs, 5 k candidates are reordered, and from a million labels on vectors are
  kept in bfloat16 to halve memory.

  Args:
    num_labels: L.
    k: the most results that will be asked for.
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
  """Label embeddings in ScaNN, in this process's memory, searched by all its CPUs.

  Labels can be added and deleted afterwards. ScaNN numbers what it holds by position, and moves its last label to the
  place of one that is deleted; which label stands where is noted here. Its own names for labels (docids) are not used:
  it saves them by pickle.

  ScaNN 1.4.2 corrupts its memory when a label that SOAR spilled to a second leaf is deleted or changed. Where SOAR is
  on, deleted labels therefore stay in it, and are dropped from what is found.

  New labels go to the leaves and codes that the first ones were trained on. `needs_rebuild` says when
  building anew is better. (ScaNN's `rebalance` trains in full as well, but keeps the number of leaves, and what
  SOAR must not delete.)

  Attributes:
    parameters: what it was built with; another `leaves_to_search` or `reorder` holds from the next search on.
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
      embeddings: [L, D], addressable by this process; ScaNN keeps its own float32 copy.
      rows: ids of the labels to search; None takes all of them.
      k: the most results that will be asked for without loss of recall.
      parameters: None chooses by `choose_parameters`.

    Raises:
      InputError: if ScaNN is not installed or cannot run on this CPU, or there is no label.
    """
    rows = np.arange(len(embeddings)) if rows is None else rows
    if embeddings.ndim != 2 or len(rows) == 0:
      raise InputError(
        f"{len(rows)} label embeddings of shape {embeddings.shape}: search needs [L, D] with L at least 1"
      )
    _scann()
    self.parameters = parameters or choose_parameters(len(rows), k)
    embeddings = np.asarray(embeddings if len(rows) == len(embeddings) else embeddings[rows], np.float32)
    self._searcher = _build(embeddings, self.parameters, k)
    self._slots = np.asarray(rows, np.int32)  # The label at each position; -1 where it is deleted but still there.
    self._built_on, self._changed = len(rows), 0

  @property
  def num_labels(self) -> int:
    """How many labels are searched, without deleted ones."""
    return int(np.sum(self._slots >= 0))

  @property
  def needs_rebuild(self) -> bool:
    """Whether so many labels came and went since it was built that it should be built anew: more than a tenth."""
    return self._changed > self._built_on / 10

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """About the k labels of highest inner product.

    Where e deleted labels are still there, twice as many labels are searched for until k others are among them, k + e
    at most. ScaNN lists by score, so the first k others of a longer list are the same.

    Args:
      queries: [Q, D].
      k: how many labels, at least 1.

    Returns:
      scores float32 [Q, K] in descending order and ids int32 [Q, K]; score -inf
      and id -1 where fewer labels were found.
    """
    queries = np.asarray(queries, np.float32)
    scores, ids = self._search(queries, k, k)
    num_labels = self.num_labels
    width, widest = k, k + len(self._slots) - num_labels
    while width < widest:
      short = np.flatnonzero((ids >= 0).sum(axis=1) < min(k, num_labels))
      width = min(2 * width, widest)
      scores[short], ids[short] = self._search(queries[short], k, width)
    return scores, ids

  def add(self, embeddings: np.ndarray, ids: np.ndarray) -> None:
    """Adds labels, about 0.01 ms each.

    Args:
      embeddings: [n, D].
      ids: int [n], none of which it holds.
    """
    places = self._searcher.searcher.upsert(
      [None] * len(ids), np.ascontiguousarray(embeddings, np.float32), _UPSERT_BATCH
    )
    expected = np.arange(len(self._slots), len(self._slots) + len(ids))
    if not np.array_equal(places, expected):
      raise RuntimeError("ScaNN put new labels elsewhere than at its end; its version is not supported")
    self._slots = np.concatenate([self._slots, np.asarray(ids, np.int32)])
    self._changed += len(ids)

  def delete(self, ids: np.ndarray) -> None:
    """Deletes labels; those that it does not hold are left alone."""
    places = np.flatnonzero(np.isin(self._slots, ids))
    self._changed += len(places)
    if self.parameters.soar:
      self._slots[places] = -1
      return
    # From the end, so that what moves to a free place is not itself to be deleted.
    places = places[::-1]
    self._searcher.searcher.delete(places.tolist())
    for place in places:
      self._slots[place] = self._slots[-1]
      self._slots = self._slots[:-1]

  def save(self, folder: Path) -> None:
    """Writes the index to an empty folder, to be found again wherever that is moved."""
    self._searcher.serialize(str(folder), relative_path=True)
    np.save(folder / "slots.npy", self._slots)
    state = {"parameters": dataclasses.asdict(self.parameters), "built_on": self._built_on, "changed": self._changed}
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

  @classmethod
  def load(cls, folder: Path) -> "ScannIndex":
    """Reads what `save` wrote.

    Raises:
      InputError: ScaNN is not installed or cannot run on this CPU, or the folder is not one that `save` wrote.
    """
    scann = _scann()
    if (folder / "scann_docids.pkl").exists():
      raise InputError(f"{folder}: holds scann_docids.pkl, which is not of this package and would be unpickled")
    index = cls.__new__(cls)
    try:
      state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
      index.parameters = ScannParameters(**state["parameters"])
      index._built_on, index._changed = state["built_on"], state["changed"]
      index._slots = np.load(folder / "slots.npy", allow_pickle=False)
      index._searcher = scann.scann_ops_pybind.load_searcher(str(folder.resolve()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
      raise InputError(f"{folder}: cannot be read as ScaNN's ({error}); write the label index anew") from error
    if index._searcher.size() != len(index._slots):
      raise InputError(
        f"{folder}: ScaNN holds {index._searcher.size()} labels but slots.npy names "
        f"{len(index._slots)}; write the label index anew"
      )
    return index

  def _search(self, queries: np.ndarray, k: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of the k best among the `width` best, without deleted labels."""
    scores = np.full((len(queries), width), -np.inf, np.float32)
    ids = np.full((len(queries), width), -1, np.int32)
    if len(queries):
      reach = min(width, len(self._slots))
      reorder = max(self.parameters.reorder, reach) if self.parameters.reorder else None
      places, found = self._searcher.search_batched_parallel(
        queries,
        final_num_neighbors=reach,
        pre_reorder_num_neighbors=reorder,
        leaves_to_search=self.parameters.leaves_to_search or None,
      )
      real = ~np.isnan(found)  # ScaNN fills up with NaN where it found fewer
      ids[:, :reach] = np.where(real, self._slots[np.where(real, places, 0)], -1)
      scores[:, :reach] = np.where(ids[:, :reach] >= 0, found, -np.inf)
    kept = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)


def _scann():
  """The package scann, imported here only: it is optional, and its import is slow.

  Raises:
    InputError: it is not installed or cannot run here.
  """
  available, reason = scann_available()
  if not available:
    raise InputError(f"search=scann cannot be used: {reason}")
  try:
    import scann
  except ImportError as error:
    raise InputError(
      f"search=scann cannot be used: the package scann does not load ({error}); "
      "install it again by pip install vixml_jax[scann]"
    ) from error
  return scann


def _build(embeddings: np.ndarray, parameters: ScannParameters, k: int):
  scann = _scann()
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
  """The CPU's instruction sets as Linux lists them; where it lists none, all that are needed."""
  if platform.machine().lower() not in ("x86_64", "amd64"):
    return frozenset(_CPU_FLAGS)
  try:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
      flags = next((line for line in lines if line.startswith("flags")), None)
  except OSError:
    flags = None
  return frozenset(flags.split(":", 1)[1].split() if flags else _CPU_FLAGS)
