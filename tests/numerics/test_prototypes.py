"""Prototypes of every method on hostile labels, and batches in which every image is missing."""

from flax import nnx
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.hypothesis_runs import few_and_many, for_all
from tests.numerics import float64
from tests.numerics.vectors import hostile_rows
from vixml_jax.models.definition import define_model
from vixml_jax.models.dual_encoder import METHODS, DualEncoder, l2_normalize
from vixml_jax.models.fusion import ImageTokens
from vixml_jax.models.parameters import merge_params, split_params

DIM, HEADS, CLUSTERS, ROWS = 8, 2, 3, 12
ENCODER = dict(
  vocab_size=20, num_layers=1, embed_dim=DIM, num_heads=HEADS, mlp_dim=12, max_position=16, num_token_types=0
)


@pytest.fixture(scope="module")
def models():
  """Method -> structure and parameters of a model with random biases and norms."""
  found = {}
  for method in METHODS:
    arguments = define_model(ENCODER, dict(num_heads=HEADS, mlp_dim=12), CLUSTERS, method=method).arguments
    graphdef, params, _ = split_params(DualEncoder(**arguments, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    found[method] = (
      graphdef,
      jax.tree.map(lambda x, rng=rng: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params),
    )
  return found


def in_float64(method, params, pooled, clusters, centroids):
  """Returns prototypes as the papers define them, before normalization; see `DualEncoder.prototypes`."""
  if method == "ngame":
    return pooled
  if method == "mean":
    return float64.unit(pooled) + float64.unit(centroids)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  free_vectors = params["free_vectors"][clusters]
  if method == "dexa":
    return pooled + free_vectors
  return float64.post_norm_layer(params["prototype"]["layer"], np.stack([pooled, free_vectors, centroids], 1)).mean(1)


@pytest.mark.parametrize("method", METHODS)
@few_and_many(3, 60)
def test_prototypes_of_hostile_labels_and_their_gradients_equal_the_transcription(models, method, examples):
  graphdef, params = models[method]
  # The network is the only method that does not undo the length of its inputs.
  largest, tolerance = (1, 2e-4) if method == "prime" else (30, 2e-6)
  shortest = 1e-13 if method in ("ngame", "mean") else 0.1  # Of vectors whose length decides the numeric step.

  @jax.jit
  def value_and_gradient(pooled, clusters, centroids, upstream):
    prototypes, vjp = jax.vjp(lambda x: merge_params(graphdef, params).prototypes(x, clusters, centroids), pooled)
    return prototypes, vjp(upstream)[0]

  def check(seed):
    rng = np.random.default_rng(seed)
    pooled, centroids = hostile_rows(rng, ROWS, DIM, largest), hostile_rows(rng, ROWS, DIM, 0)
    centroids[::3] = 0  # Labels without training queries.
    clusters, upstream = rng.integers(0, CLUSTERS, ROWS), rng.normal(size=(ROWS, DIM)).astype(np.float32)
    found, gradient = value_and_gradient(pooled, clusters, centroids, upstream)
    exact = lambda x: in_float64(method, params, x, clusters, centroids.astype(np.float64))
    pooled = pooled.astype(np.float64)
    np.testing.assert_allclose(found, float64.unit(exact(pooled)), atol=tolerance)
    assert np.isfinite(gradient).all()
    by_prototype = float64.unit_gradient(exact(pooled), upstream)
    # Numeric derivatives of the prototype before its norm, whose own gradient is known. The rows are independent.
    wanted = np.zeros_like(pooled)
    for column in range(DIM):
      step = 1e-6 * np.maximum(np.linalg.norm(pooled, axis=1), shortest) * np.eye(DIM)[column][:, None]
      slope = (exact(pooled + step.T) - exact(pooled - step.T)) / (2 * step.T[:, column : column + 1])
      wanted[:, column] = (by_prototype * slope).sum(1)
    smooth = np.abs(np.linalg.norm(pooled, axis=1) - 1e-12) > 1e-13
    scale = np.abs(wanted).max(1, keepdims=True).clip(1e-30)
    np.testing.assert_allclose((gradient / scale)[smooth], (wanted / scale)[smooth], atol=50 * tolerance)

  for_all(st.integers(0, 2**32 - 1), examples, check)


@pytest.mark.parametrize(
  "fusion",
  [
    dict(method="early", adapter="linear", residual=True),
    dict(method="early", adapter="gated"),
    dict(method="early", adapter="cross_attention"),
    dict(method="late", adapter="mlp"),
  ],
  ids=lambda fusion: f"{fusion['method']}, {fusion['adapter']}",
)
def test_a_batch_in_which_all_images_are_missing_has_finite_gradients_and_none_for_images(fusion):
  model = define_model(ENCODER, dict(num_heads=HEADS, mlp_dim=12), CLUSTERS, dict(feature_dim=6) | fusion)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), model.shapes)
  segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
  positions = jnp.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]])
  tokens = jnp.asarray(rng.integers(0, 20, segments.shape))

  def pooled(params, features):
    nowhere = ImageTokens(features, jnp.zeros((2, 3), jnp.int32), jnp.full((2, 3), 6, jnp.int32))
    rows = model.bind(params).pool(tokens, segments, positions, 3, nowhere)
    return jnp.sum(jnp.square(l2_normalize(rows) - 0.3)), rows

  value_and_gradient = jax.jit(jax.value_and_grad(pooled, has_aux=True))
  (_, rows), gradients = value_and_gradient(params, jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32))
  (_, others), _ = value_and_gradient(params, jnp.full((2, 3, 6), 7.0))
  np.testing.assert_array_equal(rows, others)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["fusion"]["project"]))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["fusion"].get("residual", {})))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["encoder"]))
