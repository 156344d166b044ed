"""Definition of a model by architecture and pooling."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.miniature_runs import TINY, TINY_DECODER
from vixml_jax.models.definition import define_model
from vixml_jax.models.dual_encoder import ARCHITECTURES, DualEncoder
from vixml_jax.models.parameters import split_params
from vixml_jax.models.pooling import last_places

ENCODER = TINY_DECODER | dict(rope_theta=1e4)
PROTOTYPE = dict(num_heads=4, mlp_dim=32)


def test_last_pooling_returns_the_last_token_of_each_item():
  model = define_model(ENCODER, PROTOTYPE, 4, architecture="decoder", pooling="last")
  model = model.bind(split_params(DualEncoder(**model.arguments, rngs=nnx.Rngs(0)))[1])
  segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
  positions = np.array([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
  tokens = np.random.default_rng(0).integers(0, 160, segments.shape)
  rows = [jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions)]
  hidden, pooled = model.encoder(*rows), model.pool(*rows, 4)
  for row in range(2):
    for slot in range(1, 5):
      places = np.flatnonzero(segments[row] == slot)
      expected = hidden[row, places[-1]] if len(places) else np.zeros(32)
      np.testing.assert_array_equal(pooled[row, slot - 1], expected)
  assert last_places(rows[1]).tolist() == [[0, 0, 1, 0, 2, 3, 0, 0], [1, 0, 0, 0, 0, 0, 0, 2]]


@pytest.mark.parametrize("residual", ["", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_have_the_dtype_of_the_residual_stream(architecture, dtype, residual):
  arguments = ENCODER if architecture == "decoder" else TINY | dict(max_position=16, num_token_types=2)
  encoder = ARCHITECTURES[architecture](
    **arguments | dict(dtype=dtype, residual_dtype=residual, attention="reference"), rngs=nnx.Rngs(0)
  )
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  hidden = jax.eval_shape(encoder, tokens, tokens, tokens, jax.random.key(0))
  layers = jax.eval_shape(encoder.encode_layers, jnp.zeros((2, 8, 32)), tokens, tokens)
  assert hidden.dtype == layers.dtype == (residual or dtype)


@pytest.mark.parametrize("unknown", [dict(architecture="gpt"), dict(pooling="first"), dict(method="siamese")])
def test_an_unknown_architecture_pooling_or_method_is_refused(unknown):
  with pytest.raises(ValueError, match=next(iter(unknown.values()))):
    define_model(ENCODER, PROTOTYPE, 4, **({"architecture": "decoder"} | unknown))
