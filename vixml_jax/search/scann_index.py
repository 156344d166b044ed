"""Approximate maximum inner product search on CPU by ScaNN, an optional package."""

import dataclasses
import importlib.util
import math
import os
import platform

import jax
import numpy as np

from vixml_jax.errors import InputError

_BRUTE_FORCE_BELOW = 20_000
_TREE_FROM = 100_000
_TRAINING_SAMPLE = 250_000
_DIMENSIONS_PER_BLOCK = 2
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
    reorder: candidates that are scored again, exactly, by product quantised score; 0 for
      brute force without quantisation.
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

  Brute force below 20K labels, quantised scores with reordering below 100K, above
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

  Attributes:
    num_labels: L.
    parameters: what it was built with.
  """

  def __init__(
    self,
    embeddings: np.ndarray | jax.Array,
    *,
    k: int = 100,
    parameters: ScannParameters | None = None,
  ):
    """Builds the index, which takes about a minute for 131K labels of 384 dimensions.

    Args:
      embeddings: [L, D], addressable by this process; ScaNN keeps its own float32 copy.
      k: the most results that will be asked for without loss of recall.
      parameters: None chooses by `choose_parameters`.

    Raises:
      InputError: if ScaNN is not installed or cannot run on this CPU, or there is no label.
    """
    available, reason = scann_available()
    if not available:
      raise InputError(f"search=scann cannot be used: {reason}")
    if embeddings.ndim != 2 or len(embeddings) == 0:
      raise InputError(
        f"label embeddings have shape {embeddings.shape}: search needs [L, D] with L at least 1"
      )
    self.num_labels = len(embeddings)
    self.parameters = parameters or choose_parameters(self.num_labels, k)
    self._searcher = _build(np.asarray(embeddings, np.float32), self.parameters, k)

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """About the k labels of highest inner product.

    Args:
      queries: [Q, D].
      k: how many labels, at least 1.

    Returns:
      scores float32 [Q, K] in descending order and ids int32 [Q, K]; score -inf
      and id -1 where fewer labels were found.
    """
    queries = np.asarray(queries, np.float32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int32)
    if len(queries) == 0:
      return scores, ids
    reach = min(k, self.num_labels)
    reorder = max(self.parameters.reorder, reach) if self.parameters.reorder else None
    found_ids, found = self._searcher.search_batched_parallel(
      queries, final_num_neighbors=reach, pre_reorder_num_neighbors=reorder
    )
    real = ~np.isnan(found)  # ScaNN fills up with NaN where it found fewer
    scores[:, :reach] = np.where(real, found, -np.inf)
    ids[:, :reach] = np.where(real, found_ids, -1)
    return scores, ids


def _build(embeddings: np.ndarray, parameters: ScannParameters, k: int):
  try:
    import scann  # here only: it is optional, and its import is slow
  except ImportError as error:
    raise InputError(
      f"search=scann cannot be used: the package scann does not load ({error}); "
      "install it again by pip install vixml_jax[scann]"
    ) from error
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
    parameters.dimensions_per_block,
    anisotropic_quantization_threshold=0.2,
    training_sample_size=sample,
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
