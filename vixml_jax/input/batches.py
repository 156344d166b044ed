"""Makes training batches as a pure function of (seed, epoch, order, step): queries and positives, packed."""

import dataclasses
import functools

import numpy as np

from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedItems, PackedLayout, pack
from vixml_jax.ragged import Ragged, padded_ids
from vixml_jax.rounding import next_power_of_two

# These numbers separate the random streams of one seed from each other and from the order of the epoch.
_POSITIVES_STREAM = 1
_MODALITY_STREAM = 3


@dataclasses.dataclass(frozen=True)
class TrainingQueries:
  """The queries and labels of which batches are made.

  Attributes:
    items: Texts and images of the training queries, N rows.
    labels: Ids of the positives of each training query, N rows, none empty.
    label_items: Texts and images of the labels, L rows.
    label_weights: Weight of each label when the positive of a query is drawn, float64 [L].
    modality_dropout: Probability with which an item of a batch loses all of its images.
    lists_positives: Whether a batch has the ids of all positives of its queries.
  """

  items: Items
  labels: Ragged
  label_items: Items
  label_weights: np.ndarray
  modality_dropout: float = 0.0
  lists_positives: bool = False

  @functools.cached_property
  def most_positives(self) -> int:
    """Number of positives of the query with the most, rounded up to a power of two."""
    return next_power_of_two(max(int(self.labels.lengths.max(initial=0)), 1))

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Batch:
  """The input of one training step, on the host.

  Attributes:
    items: The B queries followed by the B labels, packed together.
    query_ids: Row of each query in the training queries, int32 [B].
    label_ids: Id of the positive that was drawn for each query, int32 [B].
    positives: Whether label j of the batch is a positive of query i, bool [B, B].
    valid: False for the places that the last batch of an epoch does not fill, bool [B].
    positive_ids: Ids of all positives of each query, int32 [B, P], -1 for none; None where they are not needed.
  """

  items: PackedItems
  query_ids: np.ndarray
  label_ids: np.ndarray
  positives: np.ndarray
  valid: np.ndarray
  positive_ids: np.ndarray | None = None


def steps_per_epoch(num_queries: int, batch_size: int) -> int:
  """Returns the number of batches in which every query occurs once; the last batch may be smaller."""
  return -(-num_queries // batch_size)


def draw_positives(labels: Ragged, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Draws one label from each row, with probability proportional to its weight.

  Args:
    labels: Label ids, R rows, none empty.
    weights: Weight of each label, float64 [L].
    rng: Generator, from which one uniform number per row is drawn.

  Returns:
    Label ids, int32 [R].
  """
  ends = np.cumsum(weights[labels.values])
  below = np.concatenate([[0.0], ends])[labels.offsets[:-1]]
  mass = ends[labels.offsets[1:] - 1] - below
  position = np.searchsorted(ends, below + rng.random(len(labels)) * mass, side="right")
  return labels.values[np.clip(position, labels.offsets[:-1], labels.offsets[1:] - 1)].astype(np.int32)


def in_batch_positives(labels: Ragged, batch_labels: np.ndarray) -> np.ndarray:
  """Finds the positives in a batch.

  Args:
    labels: Label ids of each query, R rows.
    batch_labels: Label ids, which may repeat, int [B].

  Returns:
    Whether `batch_labels[j]` is one of the labels of row i, bool [R, B].
  """
  unique, column = np.unique(batch_labels, return_inverse=True)
  place = np.minimum(np.searchsorted(unique, labels.values), len(unique) - 1)
  hit = unique[place] == labels.values
  found = np.zeros((len(labels), len(unique)), bool)
  found[labels.row_ids()[hit], place[hit]] = True
  return found[:, column]


def make_batch(
  data: TrainingQueries, order: np.ndarray, batch_size: int, layout: PackedLayout, *, seed: int, epoch: int, step: int
) -> Batch:
  """Returns the batch of a step.

  Args:
    data: Training queries.
    order: Order of the queries in the epoch, int64 [N].
    batch_size: B, over the whole mesh.
    layout: Shape of the packed rows.
    seed: Seed of the run.
    epoch: Number of the epoch.
    step: Number of the step within the epoch, from 0.

  Returns:
    The batch, which depends on the arguments alone.
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
  # Empty places refer to the first item, which costs no computation; `valid` excludes them from the loss.
  slots = np.zeros(2 * batch_size, np.int32)
  slots[:filled], slots[batch_size : batch_size + filled] = packed.slots[:filled], packed.slots[filled:]

  def padded(ids: np.ndarray) -> np.ndarray:
    return np.pad(ids.astype(np.int32), (0, batch_size - filled))

  listed = padded_ids(labels, batch_size, data.most_positives) if data.lists_positives else None
  return Batch(dataclasses.replace(packed, slots=slots), padded(chosen), padded(drawn), positives, valid, listed)
