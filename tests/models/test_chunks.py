"""Functions over chunks: values and gradients against a plain loop, and memory that does not grow with the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax.models.chunks import map_chunks, map_chunks_recomputed

WIDTH = 256


def encode(constants, chunk):
  """A small network with noise; its inputs are floats, integers, a key and None."""
  params, table = constants
  x, choice, key, nothing = chunk
  assert nothing is None
  noise = 0.0 if key is None else jax.random.normal(key, x.shape)
  return jnp.tanh((x + noise) @ params["first"]) @ params["second"] + table[choice]


def inputs(count, keys):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"first": normal(WIDTH, WIDTH) / 16, "second": normal(WIDTH, WIDTH) / 16}
  keys = jax.random.split(jax.random.key(0), count) if keys else None
  chunks = (normal(count, 4, WIDTH), jnp.arange(count) % 3, keys, None)
  return params, normal(3, WIDTH), chunks, jnp.arange(count) % 3 != 1


@pytest.mark.parametrize(("count", "keys"), [(5, False), (5, True), (1, True)])
@pytest.mark.parametrize("over_chunks", [map_chunks, map_chunks_recomputed])
def test_values_and_gradients_are_those_of_a_loop_over_the_filled_chunks(over_chunks, count, keys):
  params, constants, chunks, filled = inputs(count, keys)
  weights = np.random.default_rng(1).normal(size=(count, 4, WIDTH)).astype(np.float32)

  def ours(params, x):
    out = over_chunks(encode, (params, constants), (x, *chunks[1:]), filled)
    return (out * weights).sum(), out

  def loop(params, x):
    one = lambda i: encode((params, constants), jax.tree.map(lambda x: x[i], (x, *chunks[1:])))
    out = jnp.stack([jnp.zeros((4, WIDTH)) if i % 3 == 1 else one(i) for i in range(count)])
    return (out * weights).sum(), out

  found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, chunks[0]) for f in (ours, loop))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
  assert (np.asarray(found[1])[~np.asarray(filled)] == 0).all()


def temporaries(over_chunks, count):
  """Returns the bytes of temporaries of a gradient over `count` chunks."""
  arguments = inputs(count, True)
  loss = lambda params, constants, *rest: (over_chunks(encode, (params, constants), *rest) ** 2).sum()
  return jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_recomputed_chunks_keep_only_their_outputs():
  output = 4 * WIDTH * 4  # Bytes of the outputs of a chunk. Only they and their cotangents are kept for each chunk.
  grown = temporaries(map_chunks_recomputed, 64) - temporaries(map_chunks_recomputed, 4)
  assert grown <= 60 * 3 * output
  parameters = 2 * WIDTH * WIDTH * 4
  assert temporaries(map_chunks, 64) - temporaries(map_chunks, 4) > 60 * parameters / 2, (
    "without recomputation, memory grows by more"
  )


def test_arrays_that_are_not_differentiated_have_no_product_in_the_backward_pass():
  params, constants, chunks, filled = inputs(4, False)

  def products(trained):
    """Returns the number of matrix products of a gradient with respect to some of the parameters."""
    frozen = {name: param for name, param in params.items() if name not in trained}

    def loss(trained):
      joined = {name: trained.get(name, frozen.get(name)) for name in params}  # In the same order.
      return map_chunks_recomputed(encode, (joined, constants), chunks, filled).sum()

    return str(jax.make_jaxpr(jax.grad(loss))({name: params[name] for name in trained})).count("dot_general")

  # Two of the forward pass, two of its repetition; the gradients of both parameters and of what is between them.
  assert products(("first", "second")) == 7
  assert products(("second",)) == 5
