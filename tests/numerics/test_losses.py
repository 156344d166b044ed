"""The losses on hostile batches, drawn by hypothesis, equal a float64 transcription: values and gradients.

Batches of one query, repeated queries and labels, several positives, no negatives, no positives, no valid place, zero
vectors, vectors of any norm before normalization, float32 and bfloat16. Similarities are rounded to float32 by the
package and are compared by themselves; the transcription continues with them in float64, so that the same negatives are
the hardest.
"""

import dataclasses
import functools

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.hypothesis_runs import few_and_many, for_all
from tests.numerics import float64
from tests.numerics.vectors import hostile_rows
from vixml_jax import losses
from vixml_jax.models.dual_encoder import l2_normalize

DIM = 4
SIZES = (1, 5)  # Few shapes, since every one is compiled.
BATCHES = 16
"""Batches that are computed at a time, with the same constants of the loss."""


@dataclasses.dataclass(frozen=True)
class Case:
  """Batches of unit or zero vectors [BATCHES, B, D], what is positive and valid in them, and the loss."""

  embeddings: list[np.ndarray]
  positives: np.ndarray
  valid: np.ndarray
  keys: jax.Array
  config: losses.LossConfig
  dtype: str


@st.composite
def configs(draw):
  """Constants of a loss, with fixed and dynamic margins, soft and hard softmax, more negatives than there are."""
  low = draw(st.sampled_from((0.0, 0.1, 0.3)))
  return losses.LossConfig(
    num_negatives=draw(st.sampled_from((1, 3, 10))),
    margin_min=low,
    margin_max=max(low, draw(st.sampled_from((0.1, 0.3, 1.0)))),
    temperature=draw(st.sampled_from((1e-3, 0.1, 10.0))),
    regulariser_weight=draw(st.sampled_from((0.0, 0.1, 2.0))),
    regulariser_margin=draw(st.sampled_from((0.1, 0.37))),
    reverse_weight=draw(st.sampled_from((0.0, 0.5, 1.0))),
  )


@st.composite
def cases(draw, arrays, dim=DIM):
  """Batches for a loss of so many arrays of embeddings."""
  size = draw(st.sampled_from(SIZES))
  seed = draw(st.integers(0, 2**32 - 1))
  rng = np.random.default_rng(seed)
  rates = draw(st.lists(st.sampled_from((0.0, 0.2, 0.5, 1.0)), min_size=2, max_size=2))
  positives = rng.random((BATCHES, size, size)) < rates[0]
  if draw(st.booleans()):
    positives |= np.eye(size, dtype=bool)
  rows = [hostile_rows(rng, BATCHES * size, dim).reshape(BATCHES, size, dim) for _ in range(arrays)]
  return Case(
    embeddings=[np.asarray(l2_normalize(jnp.asarray(each))) for each in rows],
    positives=positives,
    valid=rng.random((BATCHES, size)) < draw(st.sampled_from((0.0, 0.8, 1.0, 1.0))),
    keys=jax.random.split(jax.random.key(seed), BATCHES),
    config=draw(configs()),
    dtype=draw(st.sampled_from(("float32", "float32", "bfloat16"))),
  )


def drawn_positives(case, num_terms):
  """Returns the columns that the package draws for each of its terms [BATCHES, terms, B], after checking them."""
  both = case.positives & case.valid[:, :, None] & case.valid[:, None, :]
  reverse = 2 if num_terms == 4 else 1
  of = np.stack([both.swapaxes(1, 2) if term == reverse else both for term in range(num_terms)], axis=1)
  keys = jax.vmap(lambda key: jax.random.split(key, num_terms))(case.keys)
  drawn = np.asarray(jax.vmap(jax.vmap(losses.draw_positive))(keys, jnp.asarray(of)))
  assert np.take_along_axis(of, drawn[..., None], axis=-1)[..., 0][of.any(-1)].all()
  return drawn


def similarities(case, embeddings):
  """Returns the package's similarities of queries to the other arrays as float64, after comparing them."""
  queries, *others = embeddings
  found = []
  for other in others:
    sim = np.asarray(jax.vmap(losses.similarities)(queries, other), np.float64)
    exact = np.asarray(queries, np.float64) @ np.asarray(other, np.float64).swapaxes(1, 2)
    np.testing.assert_allclose(sim, exact, atol=5e-7)
    found.append(sim)
  return found


def assert_loss_equals(case, function, transcription, num_terms):
  """Compares value, parts and gradients of a loss of the package with a transcription, batch by batch."""
  embeddings = [jnp.asarray(x, case.dtype) for x in case.embeddings]
  loss_of = jax.value_and_grad(
    lambda embeddings, *others: function(*embeddings, *others, case.config), has_aux=True, argnums=0
  )
  masks = jnp.asarray(case.positives), jnp.asarray(case.valid)
  (loss, parts), gradients = jax.vmap(loss_of)(embeddings, *masks, case.keys)
  assert all(np.isfinite(part).all() for part in jax.tree.leaves((loss, parts, gradients)))
  sims, drawn = similarities(case, embeddings), drawn_positives(case, num_terms)
  # A softmax at a low temperature multiplies the rounding of its scores.
  error = 2e-6 * max(1, 1 / case.config.temperature) + (0.02 if case.dtype == "bfloat16" else 0)
  for i in range(BATCHES):
    value, by_sims, near_tie = transcription(
      [sim[i] for sim in sims], drawn[i], case.positives[i], case.valid[i], case.config
    )
    if near_tie:
      continue
    np.testing.assert_allclose(loss[i], value, rtol=2e-6, atol=2e-6)
    by_rows = float64.through_similarities([x[i] for x in embeddings], by_sims)
    for found, wanted in zip(gradients, by_rows, strict=True):
      np.testing.assert_allclose(np.asarray(found[i], np.float64), wanted, atol=error * max(1.0, np.abs(wanted).max()))


@few_and_many(6, 200)
def test_the_loss_of_prime_and_its_gradients_equal_the_transcription(examples):
  for_all(cases(3), examples, lambda case: assert_loss_equals(case, losses.prime_loss, float64.prime, 4))


@few_and_many(4, 100)
def test_the_loss_of_ngame_and_dexa_and_its_gradients_equal_the_transcription(examples):
  for_all(cases(2), examples, lambda case: assert_loss_equals(case, losses.siamese_loss, float64.siamese, 2))


@few_and_many(2, 60)
def test_the_loss_over_prefixes_is_the_mean_of_transcriptions_of_each_prefix(examples):
  """Prefixes of hostile vectors have any norm, zero among them; their norms have gradients of their own."""
  dims = (4, 3, 2)  # A prefix of one element has similarities of 1 and -1 only, so that almost all are ties.
  over_prefixes = lambda *arguments: losses.matryoshka_loss(
    functools.partial(_prime_of, arguments[3:]), arguments[:3], dims, l2_normalize
  )

  def transcription(case, embeddings, drawn, i):
    values, gradients, near_tie = [], [np.zeros(x[i].shape) for x in embeddings], False
    scales = [np.ones((len(x[i]), 1)) for x in embeddings]
    for dim in dims:
      short = [jnp.asarray(x[i][:, :dim]) for x in embeddings]
      rows = short if dim == DIM else [l2_normalize(x) for x in short]
      sims = [np.asarray(losses.similarities(rows[0], other), np.float64) for other in rows[1:]]
      value, by_sims, tie = float64.prime(sims, drawn[i], case.positives[i], case.valid[i], case.config)
      values.append(value)
      near_tie |= tie
      by_rows = float64.through_similarities(rows, by_sims)
      # Of unit vectors, so the sum of the weights of each row bounds its gradient before all cancellation.
      weights = [sum(np.abs(by_sim).sum(1) for by_sim in by_sims), *(np.abs(by_sim).sum(0) for by_sim in by_sims)]
      for total, scale, x, upstream, weight in zip(gradients, scales, short, by_rows, weights, strict=True):
        total[:, :dim] += (upstream if dim == DIM else float64.unit_gradient(x, upstream)) / len(dims)
        if dim != DIM:
          norms = np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
          np.maximum(scale, weight[:, None] / np.maximum(norms, 1e-12), out=scale)
    return np.mean(values), gradients, scales, near_tie

  def check(case):
    embeddings = [jnp.asarray(x) for x in case.embeddings]
    loss_of = jax.value_and_grad(
      lambda embeddings, *others: over_prefixes(*embeddings, *others, case.config), has_aux=True
    )
    masks = jnp.asarray(case.positives), jnp.asarray(case.valid)
    (loss, _), gradients = jax.vmap(loss_of)(embeddings, *masks, case.keys)
    assert all(np.isfinite(each).all() for each in jax.tree.leaves((loss, gradients)))
    drawn = drawn_positives(case, 4)
    for i in range(BATCHES):
      value, wanted, scales, near_tie = transcription(case, embeddings, drawn, i)
      if near_tie:
        continue
      np.testing.assert_allclose(loss[i], value, rtol=2e-6, atol=2e-6)
      error = 3e-6 * max(1, 1 / case.config.temperature)
      for found, each, scale in zip(gradients, wanted, scales, strict=True):
        # Parts along a short prefix cancel, and leave their rounding, which a norm of 1e-12 multiplies.
        each, limit = each / scale, error * max(1.0, np.abs(each / scale).max())
        np.testing.assert_allclose(np.asarray(found[i], np.float64) / scale, each, atol=limit)

  for_all(cases(3), examples, check)


def _prime_of(others, *embeddings):
  return losses.prime_loss(*embeddings, *others)


@few_and_many(10, 300)
def test_normalization_of_vectors_of_any_norm_equals_the_transcription(examples):
  def check(seed):
    rng = np.random.default_rng(seed)
    rows, upstream = hostile_rows(rng, 64, DIM), rng.normal(size=(64, DIM)).astype(np.float32)
    found, vjp = jax.vjp(l2_normalize, jnp.asarray(rows))
    np.testing.assert_allclose(found, float64.unit(rows), atol=3e-7)
    (gradient,) = vjp(jnp.asarray(upstream))
    wanted = float64.unit_gradient(rows, upstream)
    scale = (
      np.abs(upstream).max(1, keepdims=True) / np.maximum(np.linalg.norm(rows.astype(float), axis=1), 1e-12)[:, None]
    )
    np.testing.assert_allclose(gradient / scale, wanted / scale, atol=3e-6)
    stored = jnp.asarray(rows, jnp.bfloat16)
    np.testing.assert_allclose(l2_normalize(stored), float64.unit(stored), atol=3e-7)

  for_all(st.integers(0, 2**32 - 1), examples, check)


def test_the_mean_cosine_counts_pairs_of_valid_rows_and_is_1_for_a_collapsed_model():
  rng = np.random.default_rng(0)
  rows = np.asarray(l2_normalize(jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)))
  valid = np.arange(9) < 7
  cosines = (rows @ rows.T)[:7, :7]
  wanted = cosines[~np.eye(7, dtype=bool)].mean()
  spoiled = jnp.asarray(np.where(valid[:, None], rows, np.nan))
  np.testing.assert_allclose(losses.mean_cosine(spoiled, jnp.asarray(valid)), wanted, atol=1e-6)
  same = jnp.broadcast_to(jnp.asarray(rows[0]), (2048, 5))
  np.testing.assert_allclose(losses.mean_cosine(same, jnp.ones(2048, bool)), 1, atol=1e-5)
  for count in (0, 1):
    assert losses.mean_cosine(jnp.asarray(rows), jnp.arange(9) < count) == 0
