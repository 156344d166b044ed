"""Attention within segments against torch, with as many heads of keys as of queries and with fewer."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vixml_jax.models.attention import segment_attention


def _random(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("heads,kv_heads,causal", [(4, 4, False), (6, 2, True)])
def test_attention_equals_torch_for_each_segment_alone(heads, kv_heads, causal):
  q, k, v = (_random((2, 9, count, 8), seed) for seed, count in enumerate((heads, kv_heads, kv_heads)))
  segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 2, 2, 0, 0, 0]])
  ours = segment_attention(*map(jnp.asarray, (q, k, v, segments)), causal=causal)
  for row, slot in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
    members = segments[row] == slot
    wanted = torch.nn.functional.scaled_dot_product_attention(
      *(torch.tensor(x[row, members]).transpose(0, 1) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(0, 1)
    np.testing.assert_allclose(ours[row, members], wanted, atol=1e-6)
  assert np.isfinite(ours).all()


def test_without_segments_a_token_attends_to_its_whole_row():
  q, k, v = (jnp.asarray(_random((2, 5, 4, 8), seed)) for seed in range(3))
  one_segment = jnp.ones((2, 5), jnp.int32)
  np.testing.assert_array_equal(segment_attention(q, k, v, None), segment_attention(q, k, v, one_segment))
