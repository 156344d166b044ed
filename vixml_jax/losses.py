"""The four PRIME loss terms: three triplet losses with online hard negatives, and the prototype regulariser.

All functions take similarity matrices in float32 whose rows and columns belong to one global batch, so
that every pair of the batch counts however many devices hold it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vixml_jax.typing import Array, Bool, Float, Key

# A similarity that no cosine reaches: its softmax weight is zero beside any violator, and a row of
# nothing else gets uniform weights, as in the published implementation.
_NO_VIOLATION = -50.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Constants of the loss (PRIME, arXiv 2410.20401, section 3; values of ViXML's scripts).

  Attributes:
    num_negatives: hardest in-batch negatives a row.
    margin_min: lower bound of the dynamic margin (cosine).
    margin_max: upper bound of the dynamic margin (cosine); equal to `margin_min` for a fixed margin.
    temperature: of the softmax that weights the violating negatives.
    regulariser_weight: weight of the prototype regulariser.
    regulariser_margin: by how much a prototype must beat the plain label (cosine).
  """

  num_negatives: int = 10
  margin_min: float = 0.1
  margin_max: float = 0.3
  temperature: float = 0.1
  regulariser_weight: float = 0.1
  regulariser_margin: float = 0.1


def similarities(rows: Float[Array, "A D"], columns: Float[Array, "B D"]) -> Float[Array, "A B"]:
  """Inner products in full float32 whatever the accelerator's default."""
  return jnp.matmul(rows.astype(jnp.float32), columns.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)


def draw_positive(key: Key[Array, ""], positives: Bool[Array, "A B"]) -> Array:
  """One uniformly drawn positive column a row, int32 [A]; column 0 for a row without positives."""
  noise = jax.random.uniform(key, positives.shape)
  return jnp.argmax(jnp.where(positives, noise, -1.0), axis=1).astype(jnp.int32)


def _hardest(sim: Float[Array, "A B"], negatives: Bool[Array, "A B"], k: int) -> tuple[Array, Array]:
  """Columns of the k most similar negatives a row, and which of them exist: int32 [A, k], bool [A, k]."""
  masked = jnp.where(negatives, jax.lax.stop_gradient(sim), -jnp.inf)
  values, columns = jax.lax.top_k(masked, min(k, sim.shape[1]))
  return columns, values > -jnp.inf


def _at(matrix: Float[Array, "A B"], columns: Array) -> Array:
  return jnp.take_along_axis(matrix, columns, axis=1)


def _mean_rows(values: Float[Array, "A"], valid: Bool[Array, "A"]) -> Array:
  return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def triplet_loss(
  sim: Float[Array, "A B"],
  positives: Bool[Array, "A B"],
  valid_rows: Bool[Array, "A"],
  valid_columns: Bool[Array, "B"],
  key: Key[Array, ""],
  config: LossConfig,
) -> tuple[Array, Array]:
  """Triplet loss with online hard negatives, dynamic margin and softmax weights.

  The hinge is `maximum(0, x)`, whose gradient is halved where x is exactly 0: that is every negative
  whose gap lies within the margin's bounds, so those still push. A row with fewer true negatives than
  `num_negatives` uses those it has (the published code falls back on positives there).

  Args:
    sim: similarities of rows to columns.
    positives: which columns are positives of which row.
    valid_rows: rows that count; the last batch of an epoch is padded.
    valid_columns: columns that may serve as negatives.
    key: draws one positive a row.
    config: constants.

  Returns:
    Mean loss over valid rows, and the mean number of violating negatives a row.

  Reference: METHOD "PRIME: label prototypes"; NGAME (arXiv 2207.04452) for the hard negatives.
  """
  positive_sim = _at(sim, draw_positive(key, positives)[:, None])
  columns, exists = _hardest(sim, ~positives & valid_columns[None, :], config.num_negatives)
  negative_sim = _at(sim, columns)
  gap = jnp.abs(jax.lax.stop_gradient(positive_sim - negative_sim))
  margin = jnp.clip(gap, config.margin_min, config.margin_max)
  hinge = jnp.where(exists, jnp.maximum(0.0, negative_sim - positive_sim + margin), 0.0)
  logits = jnp.where(hinge > 0, negative_sim, _NO_VIOLATION) / config.temperature
  # A softmax over the negatives that exist; a row without any has weights (and gradients) of zero.
  peak = jnp.max(logits, axis=1, keepdims=True, where=exists, initial=_NO_VIOLATION / config.temperature)
  mass = jnp.where(exists, jnp.exp(logits - jax.lax.stop_gradient(peak)), 0.0)
  weights = mass / jnp.maximum(jnp.sum(mass, axis=1, keepdims=True), 1e-30)
  violators = jnp.sum(hinge > 0, axis=1).astype(jnp.float32)
  valid_rows = valid_rows & jnp.any(positives, axis=1)
  return _mean_rows(jnp.sum(hinge * weights, axis=1), valid_rows), _mean_rows(violators, valid_rows)


def prototype_regulariser(
  label_sim: Float[Array, "A B"],
  prototype_sim: Float[Array, "A B"],
  positives: Bool[Array, "A B"],
  valid_rows: Bool[Array, "A"],
  valid_columns: Bool[Array, "B"],
  key: Key[Array, ""],
  config: LossConfig,
) -> Array:
  """The prototype must beat the plain label: nearer to its positives and farther from hard negatives.

  Both hinges are averaged over their non-zero terms, and the sum is halved. Gradients reach both
  similarity matrices.

  Args:
    label_sim: query-to-label similarities (plain label embeddings).
    prototype_sim: query-to-prototype similarities.
    positives, valid_rows, valid_columns, key, config: as in `triplet_loss`.

  Returns:
    The scalar regulariser, unweighted.

  Reference: PRIME (arXiv 2410.20401), multi-objective regularisation; METHOD "reg".
  """
  valid_rows = (valid_rows & jnp.any(positives, axis=1))[:, None]

  def mean_of_nonzero(hinge, counts):
    hinge = jnp.where(counts, hinge, 0.0)
    return jnp.sum(hinge) / jnp.maximum(jnp.sum(hinge > 0), 1)

  drawn = draw_positive(key, positives)[:, None]
  pull = jnp.maximum(0.0, _at(label_sim, drawn) - _at(prototype_sim, drawn) + config.regulariser_margin)
  columns, exists = _hardest(prototype_sim, ~positives & valid_columns[None, :], config.num_negatives)
  push = jnp.maximum(0.0, _at(prototype_sim, columns) - _at(label_sim, columns) + config.regulariser_margin)
  return (mean_of_nonzero(pull, valid_rows) + mean_of_nonzero(push, valid_rows & exists)) / 2


def prime_loss(
  queries: Float[Array, "B D"],
  labels: Float[Array, "B D"],
  prototypes: Float[Array, "B D"],
  positives: Bool[Array, "B B"],
  valid: Bool[Array, "B"],
  key: Key[Array, ""],
  config: LossConfig,
) -> tuple[Array, dict[str, Array]]:
  """Loss = triplet(q, u) + triplet(q, prototype) + triplet(u, q) + weight * regulariser.

  Args:
    queries: unit-norm query embeddings of the global batch.
    labels: unit-norm plain label embeddings, one drawn label a query (labels may repeat).
    prototypes: unit-norm label prototypes of the same labels.
    positives: `positives[i, j]` iff label j of the batch is a positive of query i.
    valid: which (query, label) places of the batch are filled.
    key: draws the positives.
    config: constants.

  Returns:
    The scalar loss and its parts: `loss`, `triplet_label`, `triplet_prototype`, `triplet_reverse`,
    `regulariser`, `violators`.
  """
  keys = jax.random.split(key, 4)
  positives = positives & valid[:, None] & valid[None, :]
  label_sim = similarities(queries, labels)
  prototype_sim = similarities(queries, prototypes)
  to_label, _ = triplet_loss(label_sim, positives, valid, valid, keys[0], config)
  to_prototype, violators = triplet_loss(prototype_sim, positives, valid, valid, keys[1], config)
  to_query, _ = triplet_loss(label_sim.T, positives.T, valid, valid, keys[2], config)
  regulariser = prototype_regulariser(label_sim, prototype_sim, positives, valid, valid, keys[3], config)
  loss = to_label + to_prototype + to_query + config.regulariser_weight * regulariser
  return loss, {
    "loss": loss,
    "triplet_label": to_label,
    "triplet_prototype": to_prototype,
    "triplet_reverse": to_query,
    "regulariser": regulariser,
    "violators": violators,
  }
