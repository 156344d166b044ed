"""Encoding of items: unit vectors, packed items, and images on the host."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.sharded import from_host
from vixml_jax import sharding
from vixml_jax.encoding.inputs import chunk_on_mesh
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


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_rows_on_the_devices_equal_vectors_on_the_host(encoder, items, sizes):
  on_one_axis, params = encoder
  other = dataclasses.replace(on_one_axis, mesh=sharding.make_mesh(*sizes))
  params = jax.device_get(params)
  many = items.take(np.arange(1500) % 40)
  rows = other.embed_rows(params, many)
  assert rows.shape == (1500, DIM) and rows.values.shape == (2048, DIM)
  assert rows.values.sharding.is_equivalent_to(sharding.named_sharding(other.mesh, "query", "vector"), 2)
  np.testing.assert_allclose(rows.values[:1500], on_one_axis.embed(params, many), atol=1e-6)
  np.testing.assert_array_equal(rows.values[1500:], 0)
  pooled = other.pool_rows(params, many)
  np.testing.assert_allclose(pooled.values[:1500], on_one_axis.pooled(params, many), rtol=1e-5, atol=1e-6)

  rng = np.random.default_rng(3)
  clusters, centroids = rng.integers(0, 8, 1500), rng.normal(size=(1500, DIM)).astype(np.float32)
  placed = from_host(centroids, other.mesh).values
  wanted = on_one_axis.prototypes(params, on_one_axis.pooled(params, many), clusters, centroids)
  prototypes = other.prototype_rows(params, pooled, clusters, placed)
  np.testing.assert_allclose(prototypes.values[:1500], wanted, atol=1e-5)
  assert not pooled.values.is_deleted()
  again = other.prototype_rows(params, pooled, clusters, placed, donate=True)
  np.testing.assert_array_equal(again.values, prototypes.values)
  assert pooled.values.is_deleted()


def test_no_program_holds_all_rows_on_a_device(encoder, items):
  encoder, params = encoder
  num_rows = 2**18
  share = num_rows // 8 * DIM * 4
  rows = jax.ShapeDtypeStruct(
    (num_rows, DIM), np.float32, sharding=sharding.named_sharding(encoder.mesh, "label", "vector")
  )
  clusters = jax.ShapeDtypeStruct((num_rows,), np.int32, sharding=sharding.named_sharding(encoder.mesh, "label"))
  inputs = chunk_on_mesh(pack(items, encoder.layout, round_up=False), 0, None, encoder.mesh)
  ids = np.zeros(encoder.layout.chunk_rows * encoder.layout.slots, np.int32)
  for lowered in (
    encoder.store_program.lower(rows, params, {}, inputs, None, ids, normalized=True),
    encoder.prototype_rows_program.lower(rows, params, {}, clusters, rows, np.int32(0)),
  ):
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= share, "the rows are updated in place"
    assert memory.temp_size_in_bytes < share
