"""Groups texts that are nearly the same by their words, so that a split has each group on one side.

Two texts are near-duplicates if their sets of words have a Jaccard similarity of at least 0.8: of all words that one
of them has, at least four fifths are in both. Candidates are found by MinHash and locality-sensitive hashing (Broder,
1997; Leskovec et al., Mining of Massive Datasets, chapter 3), and their similarity is computed exactly. The arrays are
a few numbers for each text and word; packages such as datasketch hold Python objects for each text, which would take
gigabytes and hours for millions of rows.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from vixml_jax.input.hold_out import near_duplicate_hashes
from vixml_jax.ragged import Ragged, offsets_of, ranges

SIMILARITY = 0.8
"""Least Jaccard similarity of near-duplicates."""
# Two texts are candidates in a band if all its MinHashes agree: 99.8 % of pairs at 0.8 are in at least one band.
_BANDS, _MINHASHES = 16, 5
_ROWS_AT_ONCE = 1 << 15
_PAIRS_AT_ONCE = 1 << 18
_MOST_IN_SMALL_TABLES = 50


def split_hashes(tokens: Ragged, seed: int) -> np.ndarray:
  """Returns a uniform hash of each text, uint64 [N], which is the same for all texts of a group.

  A text without near-duplicates has its hash of `near_duplicate_hashes`, and texts with the same one are in a group.

  Args:
    tokens: Ids of the words of all texts, N rows, none of which is empty.
    seed: Seed of the hash. It does not change the groups.
  """
  hashes = near_duplicate_hashes(tokens, seed)
  _, first = np.unique(hashes, return_inverse=True)
  groups = near_duplicate_groups(tokens, first)
  least = np.full(len(hashes), np.iinfo(np.uint64).max)
  np.minimum.at(least, groups, hashes)
  has_several = np.zeros(len(hashes), bool)
  has_several[groups[least[groups] != hashes]] = True
  # The least of several hashes is no uniform number, but its hash is one.
  return np.where(has_several[groups], _mix(least[groups]), hashes)


def near_duplicate_groups(tokens: Ragged, groups: np.ndarray) -> np.ndarray:
  """Returns the group of each text, int32 [N]: given groups, joined where they have near-duplicates.

  The groups do not depend on the order of the texts. A chain of texts, each of which is like the next, could join very
  many that are not alike. So groups are not joined to one with more than 1 % of the texts; in small tables, than 50
  texts or a tenth.

  Args:
    tokens: Ids of the words of all texts, N rows, none of which is empty.
    groups: Groups that stay together, int [N].
  """
  words = _distinct(tokens)
  most = max(len(words) // 100, min(len(words) // 10, _MOST_IN_SMALL_TABLES))
  content = np.concatenate([np.add.reduceat(codes, starts) for codes, starts in _blocks(words)])
  random = np.random.default_rng(0)
  for _ in range(_BANDS):
    multipliers = random.integers(0, 2**63, _MINHASHES + 1, dtype=np.uint64) * 2 + 1
    key, order = _band(words, multipliers)
    first, second = _candidates(key, order, content)
    apart = groups[first] != groups[second]
    first, second = first[apart], second[apart]
    similar = _are_similar(words, first, second)
    groups = _joined(groups, first[similar], second[similar], most)
  return groups


def _distinct(tokens: Ragged) -> Ragged:
  """Returns the distinct words of each text, in ascending order."""
  lengths, values = [], []
  span = int(tokens.values.max(initial=0)) + 1
  for start in range(0, len(tokens), _ROWS_AT_ONCE):
    part = tokens.take(np.arange(start, min(start + _ROWS_AT_ONCE, len(tokens))))
    rows, words = np.divmod(np.unique(part.row_ids() * span + part.values), span)
    lengths.append(np.bincount(rows, minlength=len(part)))
    values.append(words.astype(np.int32))
  return Ragged(np.concatenate(values), offsets_of(np.concatenate(lengths)))


def _blocks(words: Ragged) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields uniform codes of the words of blocks of texts, uint64, and where each text starts."""
  for start in range(0, len(words), _ROWS_AT_ONCE):
    offsets = words.offsets[start : start + _ROWS_AT_ONCE + 1]
    yield _mix(words.values[offsets[0] : offsets[-1]].astype(np.uint64)), offsets[:-1] - offsets[0]


def _mix(values: np.ndarray) -> np.ndarray:
  """Returns uniform hashes of numbers, uint64 (the last steps of SplitMix64; Steele et al., 2014)."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def _band(words: Ragged, multipliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns a number that texts share if all MinHashes of the band but the last agree, and the last one, uint64 [N]."""
  keys, lasts = [], []
  for codes, starts in _blocks(words):
    key = np.zeros(len(starts), np.uint64)
    for multiplier in multipliers[:-1]:
      key = _mix(key ^ np.minimum.reduceat(codes * multiplier, starts))
    keys.append(key)
    lasts.append(np.minimum.reduceat(codes * multipliers[-1], starts))
  return np.concatenate(keys), np.concatenate(lasts)


def _candidates(key: np.ndarray, order: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns pairs of texts with the same key: each with the one before it, and with the first one.

  Texts of a key are in the order of another MinHash, so that similar ones follow one another.

  Args:
    key: uint64 [N].
    order: The other MinHash, uint64 [N].
    content: Hash of the words, uint64 [N], so that texts with other words are in one order.
  """
  rows = np.argsort(key, kind="stable")
  same = key[rows][1:] == key[rows][:-1]
  rows = rows[np.append(same, False) | np.insert(same, 0, False)]
  rows = rows[np.lexsort((content[rows], order[rows], key[rows]))]
  same = key[rows][1:] == key[rows][:-1]
  starts = np.maximum.accumulate(np.where(np.insert(same, 0, False), 0, np.arange(len(rows))))
  later = np.flatnonzero(same) + 1
  far = later[starts[later] < later - 1]
  return np.concatenate([rows[later - 1], rows[starts[far]]]), np.concatenate([rows[later], rows[far]])


def _are_similar(words: Ragged, first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Returns whether the texts of each pair are near-duplicates, bool [P]."""
  similar = np.zeros(len(first), bool)
  lengths, span = words.lengths, int(words.values.max(initial=0)) + 1
  for start in range(0, len(first), _PAIRS_AT_ONCE):
    pair = slice(start, start + _PAIRS_AT_ONCE)
    one, other = lengths[first[pair]], lengths[second[pair]]
    near = np.flatnonzero(np.minimum(one, other) >= SIMILARITY * np.maximum(one, other))
    both = []
    for rows in (first[pair][near], second[pair][near]):
      places = ranges(words.offsets[rows], lengths[rows])
      both.append(np.repeat(np.arange(len(near)), lengths[rows]) * span + words.values[places])
    found = np.sort(np.concatenate(both))
    shared = np.bincount(found[1:][found[1:] == found[:-1]] // span, minlength=len(near))
    similar[start + near] = shared >= SIMILARITY * (one[near] + other[near] - shared)
  return similar


def _joined(groups: np.ndarray, first: np.ndarray, second: np.ndarray, most: int) -> np.ndarray:
  """Returns groups that are joined by pairs of texts, unless they would have more than `most` texts together."""
  number = int(groups.max()) + 1
  links = scipy.sparse.coo_array((np.ones(len(first), bool), (groups[first], groups[second])), shape=(number, number))
  _, joined = connected_components(links, directed=False)
  is_large = np.bincount(joined[groups], minlength=number) > most
  is_large &= np.bincount(joined, minlength=number) > 1
  joined = np.where(is_large[joined], number + np.arange(number), joined)
  return np.unique(joined, return_inverse=True)[1][groups].astype(np.int32)
