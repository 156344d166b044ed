"""The prototype network and its initial values against the transformer layer of torch."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers.torch_layers import copy_torch_layer, torch_layer
from vixml_jax.models.dual_encoder import l2_normalize
from vixml_jax.models.prototype import PrototypeNetwork

DIM, HEADS, MLP = 16, 4, 24


def inputs(rows=5, seed=0):
  """Pooled label texts, free vectors and centroids, of different scales; the last label has no centroid."""
  rng = np.random.default_rng(seed)
  vectors = [(scale * rng.normal(size=(rows, DIM))).astype(np.float32) for scale in (3.0, 0.1, 1.0)]
  vectors[2][-1] = 0
  return vectors


@pytest.fixture(scope="module")
def pair():
  """torch's layer with random weights, biases and norms, and our network with the same."""
  theirs = torch_layer(DIM, HEADS, MLP)
  ours = PrototypeNetwork(DIM, HEADS, MLP, rngs=nnx.Rngs(0))
  copy_torch_layer(theirs, ours.layer)
  return theirs, ours


def test_a_prototype_is_the_mean_of_the_outputs_of_a_torch_layer(pair):
  theirs, ours = pair
  vectors = inputs()
  with torch.no_grad():
    wanted = theirs(torch.tensor(np.stack(vectors, axis=1))).mean(dim=1)
  np.testing.assert_allclose(ours(*map(jnp.asarray, vectors)), wanted, atol=1e-5)


def test_the_order_of_the_three_vectors_does_not_matter(pair):
  _, ours = pair
  pooled, free_vectors, centroids = map(jnp.asarray, inputs())
  np.testing.assert_allclose(ours(pooled, free_vectors, centroids), ours(centroids, pooled, free_vectors), atol=1e-5)


def test_dropout_acts_inside_the_network_only_with_a_key(pair):
  _, ours = pair
  vectors = [jnp.asarray(x) for x in inputs()]
  plain, one, other = (ours(*vectors, key) for key in (None, jax.random.key(1), jax.random.key(2)))
  assert not np.allclose(plain, one) and not np.allclose(one, other)
  np.testing.assert_array_equal(one, ours(*vectors, jax.random.key(1)))


def test_initial_values_are_distributed_like_those_of_torch():
  torch.manual_seed(0)
  theirs = torch.nn.TransformerEncoderLayer(256, 8, 512, activation="gelu")
  layer = PrototypeNetwork(256, 8, 512, rngs=nnx.Rngs(0)).layer
  attention = theirs.self_attn
  kernels = {
    "queries": (layer.attention.query.kernel, attention.in_proj_weight[:256]),
    "keys": (layer.attention.key.kernel, attention.in_proj_weight[256:512]),
    "values": (layer.attention.value.kernel, attention.in_proj_weight[512:]),
    "output": (layer.attention.output.kernel, attention.out_proj.weight),
    "up": (layer.up.kernel, theirs.linear1.weight),
    "down": (layer.down.kernel, theirs.linear2.weight),
    "bias of up": (layer.up.bias, theirs.linear1.bias),
    "bias of down": (layer.down.bias, theirs.linear2.bias),
  }
  for name, (ours, wanted) in kernels.items():
    ours, wanted = np.asarray(ours[...]), wanted.detach().numpy()
    tolerance = 0.15 if "bias" in name else 0.02  # A bias has 256 or 512 values.
    np.testing.assert_allclose(ours.std(), wanted.std(), rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(wanted).max(), rtol=0.03, err_msg=name)
  for linear, bias in (
    *((getattr(layer.attention, name), attention.in_proj_bias) for name in ("query", "key", "value")),
    (layer.attention.output, attention.out_proj.bias),
  ):
    assert not np.any(linear.bias[...]) and not bias.detach().numpy().any()


def test_normalizing_a_zero_vector_gives_zero_and_a_finite_gradient():
  x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
  assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(x)).all()
