"""The prototype network and its initial values against the transformer layer of torch."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

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
  torch.manual_seed(0)
  theirs = torch.nn.TransformerEncoderLayer(
    DIM, HEADS, MLP, activation="gelu", batch_first=True, norm_first=False
  ).eval()
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():
      parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
  weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
  ours = PrototypeNetwork(DIM, HEADS, MLP, rngs=nnx.Rngs(0))
  layer, head_dim = ours.layer, DIM // HEADS
  for number, name in enumerate(("query", "key", "value")):
    part = slice(number * DIM, (number + 1) * DIM)
    linear = getattr(layer.attention, name)
    linear.kernel.set_value(jnp.asarray(weights["self_attn.in_proj_weight"][part].T.reshape(DIM, HEADS, head_dim)))
    linear.bias.set_value(jnp.asarray(weights["self_attn.in_proj_bias"][part].reshape(HEADS, head_dim)))
  out = weights["self_attn.out_proj.weight"].T.reshape(HEADS, head_dim, DIM)
  layer.attention.output.kernel.set_value(jnp.asarray(out))
  layer.attention.output.bias.set_value(jnp.asarray(weights["self_attn.out_proj.bias"]))
  for module, name in ((layer.up, "linear1"), (layer.down, "linear2")):
    module.kernel.set_value(jnp.asarray(weights[f"{name}.weight"].T))
    module.bias.set_value(jnp.asarray(weights[f"{name}.bias"]))
  for module, name in ((layer.attention_norm, "norm1"), (layer.mlp_norm, "norm2")):
    module.scale.set_value(jnp.asarray(weights[f"{name}.weight"]))
    module.bias.set_value(jnp.asarray(weights[f"{name}.bias"]))
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


def test_initial_kernels_are_distributed_like_those_of_torch():
  torch.manual_seed(0)
  network = PrototypeNetwork(256, 8, 512, rngs=nnx.Rngs(0))
  for ours, theirs in ((network.layer.up, torch.nn.Linear(256, 512)), (network.layer.down, torch.nn.Linear(512, 256))):
    kernel, wanted = np.asarray(ours.kernel[...]), theirs.weight.detach().numpy()
    np.testing.assert_allclose(kernel.std(), wanted.std(), rtol=0.02)
    np.testing.assert_allclose(np.abs(kernel).max(), np.abs(wanted).max(), rtol=0.01)


def test_normalizing_a_zero_vector_gives_zero_and_a_finite_gradient():
  x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
  assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(x)).all()
