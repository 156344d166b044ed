"""Training batches as a pure function of (seed, epoch, order, step): which queries, which labels, packed."""

import dataclasses

import numpy as np

from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedItems, PackedLayout, pack
from vixml_jax.ragged import Ragged

# Separate the uses of the seed from each other and from the order of the epoch.
_POSITIVES_STREAM = 1
_MODALITY_STREAM = 3


@dataclasses.dataclass(frozen=True)
class TrainingQueries:
  """The queries that training draws from.

  Attributes:
    items: texts and images of every training query, N rows.
    labels: label ids of every training query, N rows, none empty.
    label_items: texts and images of every label, L rows.
    label_weights: float64 [L], weight with which a label is drawn as the positive of a query.
    modality_dropout: probability with which an item of a batch loses all its images.
  """

  items: Items
  labels: Ragged
  label_items: Items
  label_weights: np.ndarray
  modality_dropout: float = 0.0

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Batch:
  """One step's input, on the host.

  Attributes:
    items: the B queries and then the B labels, packed together.
    query_ids: int32 [B].
    label_ids: int32 [B], the positive drawn for each query.
    positives: bool [B, B], whether label j of the batch is a positive of query i.
    valid: bool [B], False for the places that the last batch of an epoch leaves empty.
  """

  items: PackedItems
  query_ids: np.ndarray
  label_ids: np.ndarray
  positives: np.ndarray
  valid: np.ndarray


def steps_per_epoch(num_queries: int, batch_size: int) -> int:
  """Every query is seen once an epoch; the last batch may be smaller."""
  return -(-num_queries // batch_size)


def draw_positives(labels: Ragged, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """One label a row with probability in proportion to its weight, int32 [rows].

  Args:
    labels: label ids of each row, none empty.
    weights: float64 [L].
    rng: one uniform number is drawn a row.
  """
  ends = np.cumsum(weights[labels.values])
  below = np.concatenate([[0.0], ends])[labels.offsets[:-1]]
  mass = ends[labels.offsets[1:] - 1] - below
  position = np.searchsorted(ends, below + rng.random(len(labels)) * mass, side="right")
  return labels.values[np.clip(position, labels.offsets[:-1], labels.offsets[1:] - 1)].astype(np.int32)


def in_batch_positives(labels: Ragged, batch_labels: np.ndarray) -> np.ndarray:
  """bool [rows, columns]: whether `batch_labels[j]` (labels may repeat) is among the labels of row i."""
  unique, column = np.unique(batch_labels, return_inverse=True)
  place = np.minimum(np.searchsorted(unique, labels.values), len(unique) - 1)
  hit = unique[place] == labels.values
  found = np.zeros((len(labels), len(unique)), bool)
  found[labels.row_ids()[hit], place[hit]] = True
  return found[:, column]


def make_batch(
  data: TrainingQueries, order: np.ndarray, batch_size: int, layout: PackedLayout, *, seed: int, epoch: int, step: int
) -> Batch:
  """The batch of `step` (0-based within the epoch).

  Args:
    data: training queries.
    order: int64 [N], the order of the epoch.
    batch_size: B of the whole mesh.
    layout: shape of packed rows.
    seed, epoch, step: with `order`, all that the batch depends on.
  """
  chosen = order[step * batch_size : (step + 1) * batch_size]
  labels = data.labels.take(chosen)
  rng = np.random.default_rng((seed, _POSITIVES_STREAM, epoch, step))
  drawn = draw_positives(labels, data.label_weights, rng)
  items = data.items.take(chosen).followed_by(data.label_items.take(drawn))
  if data.modality_dropout:
    rng = np.random.default_rng((seed, _MODALITY_STREAM, epoch, step))
    items = items.without_images(rng.random(len(items)) < data.modality_dropout)
  packed = pack(items, layout)
  filled = len(chosen)
  valid = np.arange(batch_size) < filled
  positives = np.zeros((batch_size, batch_size), bool)
  positives[:filled, :filled] = in_batch_positives(labels, drawn)
  # Empty places point at the first item: they are computed at no cost and count nowhere.
  slots = np.zeros(2 * batch_size, np.int32)
  slots[:filled], slots[batch_size : batch_size + filled] = packed.slots[:filled], packed.slots[filled:]

  def padded(ids):
    return np.pad(ids.astype(np.int32), (0, batch_size - filled))

  return Batch(dataclasses.replace(packed, slots=slots), padded(chosen), padded(drawn), positives, valid)
