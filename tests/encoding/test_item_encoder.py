"""Encoding of items: unit vectors, packed items, and images on the host."""

import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import ItemEncoder, normalize
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.models.definition import define_model
from vixml_jax.ragged import Ragged
from vixml_jax.run.state import init_params

VOCAB, DIM = 50, 16


@pytest.fixture(scope="module")
def encoder():
  """A tiny encoder, and random parameters."""
  sizes = dict(vocab_size=VOCAB, num_layers=1, embed_dim=DIM, num_heads=2, mlp_dim=24, max_position=16)
  model = define_model(sizes | dict(num_token_types=0), dict(num_heads=2, mlp_dim=8), num_free_vectors=8)
  mesh = sharding.make_mesh()
  return ItemEncoder(model, PackedLayout(row_length=16, chunk_rows=8), mesh), init_params(model, mesh, 0)


@pytest.fixture(scope="module")
def items():
  """Forty texts of 3 to 16 tokens."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(3, 17, 40)
  return Items.of_texts(Ragged.of_lengths(rng.integers(1, VOCAB, lengths.sum()).astype(np.int32), lengths))


def test_normalize_returns_a_new_array_and_keeps_zero_vectors():
  vectors = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
  vectors[2] = 0
  before = vectors.copy()
  result = normalize(vectors)
  np.testing.assert_array_equal(vectors, before)
  assert not np.shares_memory(result, vectors) and result.dtype == np.float32
  np.testing.assert_array_equal(result[2], 0)
  np.testing.assert_allclose(np.linalg.norm(np.delete(result, 2, 0), axis=1), 1, rtol=1e-6)


def test_embeddings_are_normalized_pooled_outputs(encoder, items):
  encoder, params = encoder
  embeddings = encoder.embed(params, items)
  assert embeddings.shape == (40, DIM) and embeddings.dtype == np.float32
  np.testing.assert_allclose(embeddings, normalize(encoder.pooled(params, items)), atol=1e-6)


def test_packed_items_have_the_same_outputs(encoder, items):
  encoder, params = encoder
  packed = pack(items, encoder.layout, round_up=False)
  assert len(packed.tokens) > 1, "the items must need several chunks"
  np.testing.assert_array_equal(encoder.pooled_packed(params, packed), encoder.pooled(params, items))


def test_the_output_of_an_item_does_not_depend_on_the_others(encoder, items):
  encoder, params = encoder
  some = np.array([31, 4, 17])
  np.testing.assert_allclose(
    encoder.pooled(params, items.take(some)), encoder.pooled(params, items)[some], rtol=1e-4, atol=1e-5
  )


def test_no_items_give_no_embeddings(encoder, items):
  encoder, params = encoder
  assert encoder.embed(params, items.take(np.arange(0))).shape == (0, DIM)
