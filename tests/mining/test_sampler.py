"""Batches for other training loops: every query once, similar ones together, the same for the same seed."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from vixml_jax.mining.sampler import HardNegativeSampler


def groups_and_rows(seed=0):
  """Embeddings of 8 groups of 4 similar queries, and the group of each."""
  rng = np.random.default_rng(seed)
  groups = rng.permutation(np.repeat(np.arange(8), 4))
  return groups, (8 * np.eye(8)[groups] + rng.normal(0, 0.1, (32, 8))).astype(np.float32)


def test_each_epoch_has_every_query_once():
  sampler = HardNegativeSampler(num_queries=10, batch_size=4)
  assert len(sampler) == 3
  for _ in range(2):
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(row for batch in batches for row in batch) == list(range(10))


def test_after_an_update_similar_queries_share_a_batch():
  groups, rows = groups_and_rows()
  sampler = HardNegativeSampler(32, batch_size=4, cluster_size=4)
  assert any(len(set(groups[batch])) > 1 for batch in sampler)
  sampler.update(rows)
  first, second = list(sampler), list(sampler)
  assert all(len(set(groups[batch])) == 1 for batch in first)
  assert first != second and sorted(map(sorted, first)) == sorted(map(sorted, second))


def test_a_run_that_is_continued_gets_the_same_batches():
  _, rows = groups_and_rows()
  samplers = [HardNegativeSampler(32, batch_size=4, cluster_size=4, seed=3) for _ in range(2)]
  for _ in range(2):
    list(samplers[0])
  samplers[1].set_epoch(2)
  for sampler in samplers:
    sampler.update(rows)
  assert list(samplers[0]) == list(samplers[1])


def test_a_data_loader_of_torch_takes_it():
  sampler = HardNegativeSampler(10, batch_size=4)
  rows = [row for batch in DataLoader(list(range(10)), batch_sampler=sampler, collate_fn=list) for row in batch]
  assert sorted(rows) == list(range(10))


def test_wrong_sizes_are_refused():
  with pytest.raises(ValueError, match="batch_size=0"):
    HardNegativeSampler(10, batch_size=0)
  with pytest.raises(ValueError, match="embeddings have 9 rows, but there are 10 queries"):
    HardNegativeSampler(10, batch_size=2).update(np.zeros((9, 4), np.float32))
