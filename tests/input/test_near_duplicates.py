"""Near-duplicates of a split: they are on one side in any order of the rows, and chains do not join everything."""

import numpy as np

from vixml_jax.input.near_duplicates import SIMILARITY, near_duplicate_groups, split_hashes
from vixml_jax.ragged import Ragged

SEEDS = range(40)


def texts_and_copies(number, length=12, seed=0):
  """Random texts, and a copy of each with another last word."""
  rng = np.random.default_rng(seed)
  texts = [rng.choice(50_000, length, replace=False).tolist() for _ in range(number)]
  return texts, [[*text[:-1], 50_000 + row] for row, text in enumerate(texts)]


def jaccard(first, second):
  return len({*first} & {*second}) / len({*first} | {*second})


def groups_of(rows):
  return near_duplicate_groups(Ragged.from_rows(rows), np.arange(len(rows)))


def test_texts_that_differ_in_a_rare_word_are_on_one_side_for_every_seed():
  texts, copies = texts_and_copies(1000)
  assert jaccard(texts[0], copies[0]) > SIMILARITY
  for seed in SEEDS[:4]:
    is_test = split_hashes(Ragged.from_rows(texts + copies), seed) < np.uint64(2**64 // 10)
    assert np.mean(is_test[:1000] == is_test[1000:]) > 0.99
    assert 0.06 < is_test.mean() < 0.14


def test_groups_are_exactly_those_of_similar_texts():
  rng = np.random.default_rng(1)
  rows = [rng.choice(12, rng.integers(1, 10)).tolist() for _ in range(40)] * 2  # All of them are similar to a few.
  rows += texts_and_copies(60)[0] + texts_and_copies(60)[1]
  groups = groups_of(rows)
  for first in range(80, 200):
    for second in range(first):
      if groups[first] == groups[second]:
        assert jaccard(rows[first], rows[second]) >= SIMILARITY
      else:
        assert jaccard(rows[first], rows[second]) < SIMILARITY
  # Texts of one word differ, whatever their number.
  assert len(np.unique(groups_of([[word] for word in range(500)]))) == 500


def test_given_groups_stay_together():
  rows = [[word, word + 1000, word + 2000] for word in range(400)]
  given = np.arange(400) // 2
  groups = near_duplicate_groups(Ragged.from_rows(rows), given)
  np.testing.assert_array_equal(groups[::2], groups[1::2])
  assert len(np.unique(groups)) == 200


def test_the_order_of_rows_and_of_words_does_not_matter():
  texts, copies = texts_and_copies(500)
  copies_of_copies = [[60_000 + row, *copy[1:]] for row, copy in enumerate(copies)]
  rows = texts + copies + copies_of_copies
  rng = np.random.default_rng(2)
  order = rng.permutation(len(rows))
  hashes = split_hashes(Ragged.from_rows(rows), 0)
  other = split_hashes(Ragged.from_rows([rng.permutation(rows[row]).tolist() for row in order]), 0)
  np.testing.assert_array_equal(other, hashes[order])


def test_the_seed_decides_the_side_and_groups_are_uniform():
  texts, copies = texts_and_copies(1000)
  tokens = Ragged.from_rows(texts[:50] + copies[:50] + texts[50:])
  sides = np.stack([split_hashes(tokens, seed) < np.uint64(2**64 // 10) for seed in SEEDS])
  assert len({side.tobytes() for side in sides}) == len(SEEDS)
  assert 0.07 < sides[:, :100].mean() < 0.13  # Of groups.
  assert 0.07 < sides[:, 100:].mean() < 0.13  # Of single texts.


def test_a_chain_of_similar_texts_is_divided():
  """Each text has 19 of the 20 words of the next one."""
  rows = [list(range(start, start + 20)) for start in range(3000)]
  assert jaccard(rows[0], rows[1]) > SIMILARITY > jaccard(rows[0], rows[3])
  groups = groups_of(rows)
  assert 1 < np.bincount(groups).max() <= 50
  shares = [(split_hashes(Ragged.from_rows(rows), seed) < np.uint64(2**64 // 10)).mean() for seed in SEEDS[:10]]
  assert max(shares) < 0.25 and 0.07 < np.mean(shares) < 0.13


def test_a_text_that_is_repeated_hides_no_near_duplicate():
  texts, copies = texts_and_copies(200)
  rows = [text for text in texts for _ in range(5)] + copies
  groups = groups_of(rows)
  assert np.mean(groups[:1000:5] == groups[1000:]) > 0.99
