"""Recall of ScaNN against exact search, measured on a sample of queries."""

import logging
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import ScannIndex

RECALL_AT = (10, 100)
_SAMPLE_SIZE = 1_000

_log = logging.getLogger(__name__)


def measure_recall(
  scann: ScannIndex, embeddings: np.ndarray, live: np.ndarray, queries: np.ndarray | None, mesh: Mesh | None
) -> dict[str, Any]:
  """Returns the share of the labels of exact search that ScaNN finds, and logs it.

  Args:
    scann: ScaNN over the live labels.
    embeddings: Label embeddings float32 [L, D].
    live: Ids of the live labels, ascending.
    queries: Training queries [N, D] to draw the sample from; None draws it from the live labels.
    mesh: Devices of the exact search; None uses all devices of this process.

  Returns:
    `recall@10` and `recall@100` in percent, `queries`, the size of the sample, and `of`, what it was drawn from.
  """
  pool, name = (embeddings[live], "labels") if queries is None else (queries, "training queries")
  sample = np.asarray(pool[np.linspace(0, len(pool) - 1, min(_SAMPLE_SIZE, len(pool))).astype(int)], np.float32)
  mesh = Mesh(np.asarray(jax.local_devices()), ("data",)) if mesh is None else mesh
  k = min(max(RECALL_AT), len(live))
  _, exact_ids = ExactIndex(embeddings, mesh, rows=live).search(sample, k)
  _, scann_ids = scann.search(sample, k)
  recall = {f"recall@{at}": 100 * overlap(scann_ids[:, :at], exact_ids[:, :at]) for at in RECALL_AT}
  _log.info(
    "recall of ScaNN against exact search: %s, on %s %s",
    ", ".join(f"{value:.2f} % ({metric})" for metric, value in recall.items()),
    f"{len(sample):,}",
    name,
  )
  return recall | {"queries": len(sample), "of": name}
