"""The four loss terms against a plain numpy implementation of PRIME (arXiv 2410.20401), row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vixml_jax import losses
from vixml_jax.models.dual_encoder import l2_normalize

CONFIG = losses.LossConfig(num_negatives=4)


def numpy_triplet(sim, positives, drawn, config, valid):
  """PRIME's triplet loss, one row at a time, and d loss / d sim, with the gradient of a tie halved."""
  total, gradient, rows = 0.0, np.zeros_like(sim), 0
  for i in np.flatnonzero(valid & positives.any(1)):
    rows += 1
    negatives = [j for j in np.argsort(-sim[i], kind="stable") if not positives[i, j] and valid[j]]
    negatives = negatives[: config.num_negatives]
    if not negatives:
      continue
    s_p, s_n = sim[i, drawn[i]], sim[i, negatives]
    margin = np.clip(np.abs(s_p - s_n), config.margin_min, config.margin_max)
    x = s_n - s_p + margin
    hinge = np.maximum(0, x)
    slope = np.where(x > 0, 1.0, np.where(x == 0, 0.5, 0.0))
    logits = np.where(hinge > 0, s_n, -50.0) / config.temperature
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    total += np.sum(hinge * weights)
    # Through the hinge, and through the weights of the violators.
    gradient[i, drawn[i]] -= np.sum(weights * slope)
    through_softmax = weights * (hinge - np.sum(hinge * weights)) / config.temperature * (hinge > 0)
    np.add.at(gradient[i], negatives, weights * slope + through_softmax)
  return total / max(rows, 1), gradient / max(rows, 1)


def batch(seed, size=12, label_rate=0.15):
  rng = np.random.default_rng(seed)
  embed = lambda: np.asarray(rng.normal(size=(size, 6)), np.float32)
  q, u, p = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (embed(), embed(), embed()))
  positives = rng.random((size, size)) < label_rate
  np.fill_diagonal(positives, True)
  return q, u, p, positives


@pytest.mark.parametrize("seed", range(4))
def test_triplet_loss_and_its_gradient_equal_those_in_numpy(seed):
  q, u, _, positives = batch(seed)
  sim = np.asarray(q @ u.T, np.float32)
  valid = np.ones(len(q), bool)
  key = jax.random.key(seed)
  drawn = np.asarray(losses.draw_positive(key, jnp.asarray(positives)))
  assert positives[np.arange(len(q)), drawn].all()
  (loss, _), gradient = jax.value_and_grad(losses.triplet_loss, has_aux=True)(
    *map(jnp.asarray, (sim, positives, valid, valid)), key, CONFIG
  )
  expected, expected_gradient = numpy_triplet(sim, positives, drawn, CONFIG, valid)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_a_gap_within_the_margin_passes_half_the_gradient():
  sim = jnp.asarray([[0.7, 0.5, 0.45]])
  positives = jnp.asarray([[True, False, False]])
  ones = jnp.ones(1, bool), jnp.ones(3, bool)
  gradient = jax.grad(lambda s: losses.triplet_loss(s, positives, *ones, jax.random.key(0), CONFIG)[0])(sim)
  np.testing.assert_allclose(gradient, [[-0.5, 0.25, 0.25]], atol=1e-7)


def test_a_row_without_negatives_adds_nothing_and_keeps_gradients_finite():
  sim = jnp.asarray([[0.2, 0.4], [0.1, 0.3]])
  positives = jnp.asarray([[True, True], [False, True]])
  ones = jnp.ones(2, bool), jnp.ones(2, bool)
  loss, gradient = jax.value_and_grad(lambda s: losses.triplet_loss(s, positives, *ones, jax.random.key(0), CONFIG)[0])(
    sim
  )
  assert np.isfinite(loss) and np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[0], [0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_the_regulariser_equals_that_in_numpy(seed):
  q, u, p, positives = batch(seed)
  label_sim, prototype_sim = q @ u.T, q @ p.T
  valid = np.ones(len(q), bool)
  key = jax.random.key(seed)
  drawn = np.asarray(losses.draw_positive(key, jnp.asarray(positives)))
  pull, push = [], []
  for i in range(len(q)):
    pull.append(max(0, label_sim[i, drawn[i]] - prototype_sim[i, drawn[i]] + 0.1))
    negatives = [j for j in np.argsort(-prototype_sim[i], kind="stable") if not positives[i, j]]
    push += [max(0, prototype_sim[i, j] - label_sim[i, j] + 0.1) for j in negatives[: CONFIG.num_negatives]]
  mean_nonzero = lambda xs: np.sum(xs) / max(np.count_nonzero(xs), 1)
  expected = (mean_nonzero(pull) + mean_nonzero(push)) / 2
  found = losses.prototype_regulariser(
    *map(jnp.asarray, (label_sim, prototype_sim, positives, valid, valid)), key, CONFIG
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_prime_loss_is_the_weighted_sum_of_its_parts_and_ignores_padding():
  q, u, p, positives = batch(0)
  ones = np.ones(len(q), bool)

  def prime_loss(*arrays):
    return losses.prime_loss(*map(jnp.asarray, arrays), jax.random.key(1), CONFIG)

  loss, parts = prime_loss(q, u, p, positives, ones)
  np.testing.assert_allclose(
    loss,
    parts["triplet_label"] + parts["triplet_prototype"] + parts["triplet_reverse"] + 0.1 * parts["regulariser"],
    rtol=1e-6,
  )
  # The values of padded places must not matter: as rows, as columns and as positives.
  half = ones.copy()
  half[6:] = False
  only_diagonal = np.eye(len(q), dtype=bool)
  spoiled = [np.where(half[:, None], x, 7.0) for x in (q, u, p)]
  with_garbage = only_diagonal | ~half[None, :] | ~half[:, None]
  clean = prime_loss(q, u, p, only_diagonal, half)[0]
  dirty = prime_loss(*spoiled, with_garbage, half)[0]
  np.testing.assert_allclose(clean, dirty, rtol=1e-6)


def test_positives_are_drawn_uniformly():
  positives = jnp.asarray([[True, False, True, True]])
  draws = jax.vmap(lambda key: losses.draw_positive(key, positives)[0])(jax.random.split(jax.random.key(0), 3000))
  shares = np.bincount(draws, minlength=4) / 3000
  np.testing.assert_allclose(shares, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.03)


def bound_loss(which, positives, valid, key):
  """Returns the loss of PRIME (three embeddings) or that of NGAME and DEXA (two) as a function of embeddings alone."""
  function = losses.prime_loss if which == 3 else losses.siamese_loss
  return lambda *embeddings: function(*embeddings, jnp.asarray(positives), jnp.asarray(valid), key, CONFIG)


@pytest.mark.parametrize("which", [2, 3])
def test_the_matryoshka_loss_is_the_mean_of_the_loss_in_numpy_on_normalized_prefixes(which):
  q, u, p, positives = batch(3)
  valid = np.arange(len(q)) < 10
  key = jax.random.key(5)
  embeddings = (q, u, p)[:which]
  loss, parts = losses.matryoshka_loss(
    bound_loss(which, positives, valid, key), [*map(jnp.asarray, embeddings)], (6, 4, 2), l2_normalize
  )
  both_valid = positives & valid[:, None] & valid[None, :]
  keys = jax.random.split(key, 4 if which == 3 else 2)
  drawn = [np.asarray(losses.draw_positive(k, jnp.asarray(both_valid))) for k in keys]
  drawn_labels = np.asarray(losses.draw_positive(keys[2 if which == 3 else 1], jnp.asarray(both_valid.T)))
  expected = []
  for dim in (6, 4, 2):
    prefixes = [x[:, :dim] / np.linalg.norm(x[:, :dim], axis=1, keepdims=True) for x in embeddings]
    sims = [prefixes[0] @ other.T for other in prefixes[1:]]
    total = sum(numpy_triplet(sim, both_valid, drawn[i], CONFIG, valid)[0] for i, sim in enumerate(sims))
    total += numpy_triplet(sims[0].T, both_valid.T, drawn_labels, CONFIG, valid)[0]
    if which == 3:
      total += 0.1 * float(
        losses.prototype_regulariser(
          *map(jnp.asarray, (*sims, both_valid, valid, valid)), keys[3], CONFIG
        )  # Compared with numpy above.
      )
    expected.append(total)
    np.testing.assert_allclose(parts[f"loss_of_{dim}"], total, rtol=1e-5)
  np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
  np.testing.assert_allclose(parts["loss"], loss, rtol=1e-6)


def test_the_matryoshka_loss_of_whole_embeddings_has_the_bits_of_the_loss_itself():
  q, u, p, positives = batch(1)
  loss_of = bound_loss(3, positives, np.ones(len(q), bool), jax.random.key(0))
  of_prefixes = lambda *x: losses.matryoshka_loss(loss_of, x, (6,), l2_normalize)[0]
  for found, wanted in zip(
    jax.value_and_grad(of_prefixes, argnums=(0, 1, 2))(*map(jnp.asarray, (q, u, p))),
    jax.value_and_grad(lambda *x: loss_of(*x)[0], argnums=(0, 1, 2))(*map(jnp.asarray, (q, u, p))),
    strict=True,
  ):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_gradient_of_the_matryoshka_loss_equals_that_of_torch_through_prefixes_and_norms():
  q, u, _, _ = batch(2)
  cosines = lambda a, b: (jnp.sum(jnp.square(1 - jnp.sum(a * b, axis=1))), {})
  of_prefixes = lambda *x: losses.matryoshka_loss(cosines, x, (5, 2), l2_normalize)[0]
  found = jax.grad(of_prefixes, argnums=(0, 1))(jnp.asarray(q), jnp.asarray(u))
  leaves = [torch.tensor(x, requires_grad=True) for x in (q, u)]
  terms = [
    (1 - torch.nn.functional.cosine_similarity(leaves[0][:, :dim], leaves[1][:, :dim])).square().sum() for dim in (5, 2)
  ]
  (sum(terms) / 2).backward()
  for ours, theirs in zip(found, leaves, strict=True):
    np.testing.assert_allclose(ours, theirs.grad, atol=1e-5)
