"""The losses: triplet losses with online hard negatives, alone (NGAME, DEXA) or with the regularizer of PRIME.

`matryoshka_loss` computes one of them on several prefixes of the embeddings.

All functions take similarities in float32 whose rows and columns belong to one global batch, so every pair of the
batch counts, whatever the number of devices.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp

from vixml_jax.typing import Array, Bool, Float, Key

# A similarity below that of any cosine. Beside a violating negative, its softmax weight is zero. A row without
# violating negatives gets uniform weights, as in the published code.
_NO_VIOLATION = -50.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Constants of the loss; the defaults are those of ViXML's scripts.

  Attributes:
    num_negatives: Number of hardest in-batch negatives per row.
    margin_min: Lower bound of the dynamic margin (cosine).
    margin_max: Upper bound of the dynamic margin (cosine); equal to `margin_min` for a fixed margin.
    temperature: Temperature of the softmax that weights the violating negatives.
    regulariser_weight: Weight of the prototype regularizer.
    regulariser_margin: Margin by which a prototype must be better than the plain label (cosine).
    reverse_weight: Weight of the triplet loss of labels against queries.

  Reference: loss of PRIME (arXiv 2410.20401).
  """

  num_negatives: int = 10
  margin_min: float = 0.1
  margin_max: float = 0.3
  temperature: float = 0.1
  regulariser_weight: float = 0.1
  regulariser_margin: float = 0.1
  reverse_weight: float = 1.0


def similarities(rows: Float[Array, "A D"], columns: Float[Array, "B D"]) -> Float[Array, "A B"]:
  """Returns inner products in full float32, independent of the accelerator's default precision."""
  return jnp.matmul(rows.astype(jnp.float32), columns.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)


def draw_positive(key: Key[Array, ""], positives: Bool[Array, "A B"]) -> Array:
  """Draws one positive column per row, uniformly.

  A row with one positive always draws it:

  >>> draw_positive(jax.random.key(0), jnp.asarray([[False, True], [True, False]])).tolist()
  [1, 0]

  Args:
    key: Random key.
    positives: `positives[i, j]` says whether column j is a positive of row i.

  Returns:
    int32 [A]; column 0 for a row without positives.
  """
  noise = jax.random.uniform(key, positives.shape)
  return jnp.argmax(jnp.where(positives, noise, -1.0), axis=1).astype(jnp.int32)


def triplet_loss(
  sim: Float[Array, "A B"],
  positives: Bool[Array, "A B"],
  valid_rows: Bool[Array, "A"],
  valid_columns: Bool[Array, "B"],
  key: Key[Array, ""],
  config: LossConfig,
) -> tuple[Array, Array]:
  """Computes the triplet loss with online hard negatives, a dynamic margin and softmax weights.

  The margin of a negative is the size of its gap to the positive, between `margin_min` and `margin_max`. The first row
  below has a negative at 0.5 and a positive at 0.6: the gap 0.1 gives the margin 0.1 and a loss of 0. In the second
  row the negative is above the positive by 0.4, so the margin is 0.3 and the loss 0.7.

  >>> sim = jnp.asarray([[0.6, 0.5], [0.8, 0.4]])
  >>> positives, valid = jnp.eye(2, dtype=bool), jnp.ones(2, bool)
  >>> loss, violators = triplet_loss(sim, positives, valid, valid, jax.random.key(0), LossConfig())
  >>> round(float(loss), 3)  # The mean of 0 and 0.7.
  0.35

  The hinge is `maximum(0, x)`, whose gradient is halved where x is exactly 0. This is the case for every negative that
  is less similar than the positive by a gap within the bounds of the margin, so these negatives still contribute. A row
  with fewer true negatives than `num_negatives` uses all it has; the published code adds positives in that case.

  Args:
    sim: Similarities of rows to columns.
    positives: `positives[i, j]` says whether column j is a positive of row i.
    valid_rows: Rows that count. The last batch of an epoch is padded.
    valid_columns: Columns that can be negatives.
    key: Random key that draws one positive per row.
    config: Constants of the loss.

  Returns:
    `(loss, violators)`: the mean loss over valid rows, and the mean number of violating negatives per row.

  Reference: loss of PRIME (arXiv 2410.20401); online hard negatives of NGAME (arXiv 2207.04452).
  """
  positive_sim = _at(sim, draw_positive(key, positives)[:, None])
  columns, exists = _hardest(sim, ~positives & valid_columns[None, :], config.num_negatives)
  negative_sim = _at(sim, columns)
  gap = jnp.abs(jax.lax.stop_gradient(positive_sim - negative_sim))
  margin = jnp.clip(gap, config.margin_min, config.margin_max)
  hinge = jnp.where(exists, jnp.maximum(0.0, negative_sim - positive_sim + margin), 0.0)
  logits = jnp.where(hinge > 0, negative_sim, _NO_VIOLATION) / config.temperature
  # Softmax over the negatives that exist. A row without any has weights and gradients of zero.
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
  """Computes the regularizer that makes a prototype better than the plain label.

  A prototype must be more similar than the plain label to its positive queries, and less similar to queries for which
  it is a hard negative. Each of the two hinges is averaged over its non-zero terms, and the result is half their sum.
  Gradients flow to both similarity matrices.

  Args:
    label_sim: Similarities of queries to plain label embeddings.
    prototype_sim: Similarities of queries to prototypes.
    positives: As in `triplet_loss`.
    valid_rows: As in `triplet_loss`.
    valid_columns: As in `triplet_loss`.
    key: As in `triplet_loss`.
    config: Constants of the loss.

  Returns:
    The scalar regularizer, without its weight.

  Reference: regularization of PRIME's multi-objective loss (arXiv 2410.20401).
  """
  valid_rows = (valid_rows & jnp.any(positives, axis=1))[:, None]

  def mean_of_nonzero(hinge: Array, counts: Array) -> Array:
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
  """Computes the loss of PRIME.

  It is triplet(query, label) + triplet(query, prototype) + `reverse_weight` * triplet(label, query) +
  `regulariser_weight` * regularizer.

  Args:
    queries: Unit-norm query embeddings of the global batch.
    labels: Unit-norm plain label embeddings, one drawn label per query. Labels may repeat.
    prototypes: Unit-norm prototypes of the same labels.
    positives: `positives[i, j]` says whether label j of the batch is a positive of query i.
    valid: Places of the batch that are filled; the others are padding.
    key: Random key that draws the positives.
    config: Constants of the loss.

  Returns:
    The scalar loss and its parts: `loss`, `triplet_label`, `triplet_prototype`, `triplet_reverse`, `regulariser` and
    `violators`.

  Reference: loss of PRIME (arXiv 2410.20401).
  """
  keys = jax.random.split(key, 4)
  positives = positives & valid[:, None] & valid[None, :]
  label_sim = similarities(queries, labels)
  prototype_sim = similarities(queries, prototypes)
  to_label, _ = triplet_loss(label_sim, positives, valid, valid, keys[0], config)
  to_prototype, violators = triplet_loss(prototype_sim, positives, valid, valid, keys[1], config)
  to_query, _ = triplet_loss(label_sim.T, positives.T, valid, valid, keys[2], config)
  regulariser = prototype_regulariser(label_sim, prototype_sim, positives, valid, valid, keys[3], config)
  loss = to_label + to_prototype + config.reverse_weight * to_query + config.regulariser_weight * regulariser
  return loss, {
    "loss": loss,
    "triplet_label": to_label,
    "triplet_prototype": to_prototype,
    "triplet_reverse": to_query,
    "regulariser": regulariser,
    "violators": violators,
  }


def siamese_loss(
  queries: Float[Array, "B D"],
  prototypes: Float[Array, "B D"],
  positives: Bool[Array, "B B"],
  valid: Bool[Array, "B"],
  key: Key[Array, ""],
  config: LossConfig,
) -> tuple[Array, dict[str, Array]]:
  """Computes the loss of NGAME and DEXA: triplet(query, prototype) + `reverse_weight` * triplet(prototype, query).

  Both methods use a fixed margin of 0.3 (`margin_min` and `margin_max`) and a `reverse_weight` of 0. A reverse term of
  weight 0 is not computed.

  Args:
    queries: Unit-norm query embeddings of the global batch.
    prototypes: Unit-norm vectors by which the drawn labels are scored, one drawn label per query. Labels may repeat.
    positives: `positives[i, j]` says whether label j of the batch is a positive of query i.
    valid: Places of the batch that are filled; the others are padding.
    key: Random key that draws the positives.
    config: Constants of the loss. Those of the regularizer are not used.

  Returns:
    The scalar loss and its parts: `loss`, `triplet_prototype`, `triplet_reverse` and `violators`.

  Reference: NGAME (arXiv 2207.04452); DEXA (KDD 2023); `main.py` of DiegoOrtego/vixml without `--prime`, whose triplet
  loss this is.
  """
  keys = jax.random.split(key, 2)
  positives = positives & valid[:, None] & valid[None, :]
  sim = similarities(queries, prototypes)
  loss, violators = triplet_loss(sim, positives, valid, valid, keys[0], config)
  parts = {"triplet_prototype": loss, "triplet_reverse": jnp.zeros(()), "violators": violators}
  if config.reverse_weight:
    parts["triplet_reverse"], _ = triplet_loss(sim.T, positives.T, valid, valid, keys[1], config)
    loss = loss + config.reverse_weight * parts["triplet_reverse"]
  return loss, {"loss": loss, **parts}


def matryoshka_loss(
  loss: Callable[..., tuple[Array, dict[str, Array]]],
  embeddings: Sequence[Float[Array, "B D"]],
  dims: Sequence[int],
  normalize: Callable[[Array], Array],
) -> tuple[Array, dict[str, Array]]:
  """Computes the mean of a loss over prefixes of the embeddings, so that a prefix can be searched by itself.

  The vectors of a batch are encoded once, and only the loss sees their prefixes. Each prefix is normalized again. All
  terms of the loss use the prefixes. All prefixes use the same random key, so the same positives are drawn; the hard
  negatives are those of each prefix. With the dimension D alone, the result is that of the loss itself.

  >>> sum_of_first = lambda x: (x[:, 0].sum(), {"loss": x[:, 0].sum()})
  >>> unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
  >>> matryoshka_loss(sum_of_first, [jnp.asarray([[0.6, 0.8]])], (2, 1), unit)[0].round(3)  # The mean of 0.6 and 1.
  Array(0.8, dtype=float32)

  Args:
    loss: Function of the embeddings that returns the scalar loss and its parts, such as `prime_loss` with its other
      arguments bound.
    embeddings: Unit-norm vectors, the arguments of the loss.
    dims: Lengths of the prefixes, each at most D.
    normalize: Scales rows to unit norm.

  Returns:
    The scalar loss, and the mean of each part over the prefixes. `loss_of_N` is the loss of the first N dimensions.

  Reference: Matryoshka representation learning (arXiv 2205.13147), with equal weights.
  """
  losses, all_parts = [], []
  for dim in dims:
    value, parts = loss(*(x if dim == x.shape[1] else normalize(x[:, :dim]) for x in embeddings))
    losses.append(value)
    all_parts.append(parts)
  means = {name: jnp.mean(jnp.stack([parts[name] for parts in all_parts])) for name in all_parts[0]}
  by_dim = {f"loss_of_{dim}": value for dim, value in zip(dims, losses, strict=True)}
  return jnp.mean(jnp.stack(losses)), means | by_dim


def mean_cosine(rows: Float[Array, "B D"], valid: Bool[Array, "B"]) -> Array:
  """Returns the mean cosine between two different rows of a batch; near 1, the model has collapsed.

  The cost is linear in B: the cosines of all pairs add up to the squared length of the sum of the rows.

  >>> mean_cosine(jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.ones(3, bool)).round(3)
  Array(0.333, dtype=float32)

  Args:
    rows: Vectors of unit norm.
    valid: Rows that count.

  Returns:
    The mean, float32; 0 for fewer than two rows.
  """
  counted = jnp.where(valid[:, None], rows.astype(jnp.float32), 0.0)
  num_rows = jnp.sum(valid, dtype=jnp.float32)
  of_pairs = jnp.sum(jnp.square(jnp.sum(counted, axis=0))) - jnp.sum(jnp.square(counted))
  return of_pairs / jnp.maximum(num_rows * (num_rows - 1.0), 1.0)


def _hardest(sim: Float[Array, "A B"], negatives: Bool[Array, "A B"], k: int) -> tuple[Array, Array]:
  """Returns the columns of the k most similar negatives per row, int32 [A, k], and which of them exist, bool [A, k]."""
  masked = jnp.where(negatives, jax.lax.stop_gradient(sim), -jnp.inf)
  values, columns = jax.lax.top_k(masked, min(k, sim.shape[1]))
  return columns, values > -jnp.inf


def _at(matrix: Float[Array, "A B"], columns: Array) -> Array:
  return jnp.take_along_axis(matrix, columns, axis=1)


def _mean_rows(values: Float[Array, "A"], valid: Bool[Array, "A"]) -> Array:
  return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
