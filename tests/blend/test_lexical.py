"""TF-IDF by words and pairs of words: weights of scikit-learn, search against brute force, pruning, blocks."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from vixml_jax.blend import lexical
from vixml_jax.blend.lexical import LexicalIndex, TfIdf, count_ngrams

TEXTS = ["red shoe", "blue shoe", "red shoe size red", "", "green hat with a red band"]


def _vectors(texts, fitted=TEXTS):
  return TfIdf.fit([count_ngrams([fitted])]).vectors(count_ngrams([texts]))


def test_similarities_are_those_of_scikit_learn():
  other = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(TEXTS)
  queries = ["red shoe", "blue hat", "unknown red"]
  # A word that the texts of scikit-learn lack has no column there, so that the norm of its query is another.
  ours = (_vectors(queries[:2]) @ _vectors(TEXTS).T).toarray()[:1]
  theirs = (other.transform(queries[:1]) @ other.transform(TEXTS).T).toarray()
  np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_vectors_have_unit_length_and_a_text_without_words_a_zero_vector():
  norms = np.sqrt(_vectors(TEXTS).multiply(_vectors(TEXTS)).sum(axis=1))
  np.testing.assert_allclose(norms, [1, 1, 1, 0, 1], atol=1e-6)


def test_blocks_of_texts_and_several_matrices_change_nothing():
  whole, blocks = count_ngrams([TEXTS]), count_ngrams([TEXTS[:2], [], TEXTS[2:]])
  np.testing.assert_array_equal(whole.indices, blocks.indices)
  np.testing.assert_array_equal(whole.data, blocks.data)
  np.testing.assert_array_equal(TfIdf.fit([whole]).idf, TfIdf.fit([whole[:2], whole[2:]]).idf)
  assert count_ngrams([]).shape == (0, lexical.NUM_COLUMNS)


@pytest.mark.parametrize("block", [1, 2, 256])
def test_search_finds_what_brute_force_finds(monkeypatch, block):
  monkeypatch.setattr(lexical, "_QUERIES_PER_BLOCK", block)
  rng = np.random.default_rng(0)
  words = np.array(["a1", "b2", "c3", "d4", "e5", "f6", "g7", "h8"])
  items, queries = ([" ".join(rng.choice(words, 3)) for _ in range(count)] for count in (30, 7))
  items[4] = items[9]  # Equal scores: the lower id comes first.
  vectors, asked = _vectors(items, items), _vectors([*queries, "zz"], items)
  scores, ids = LexicalIndex.build(vectors).search(asked, 6)
  dense = (asked @ vectors.T).toarray()
  for query, row in enumerate(dense):
    order = [item for item in np.lexsort((np.arange(30), -row)) if row[item] > 0][:6]
    assert ids[query].tolist() == order + [-1] * (6 - len(order))
    np.testing.assert_allclose(scores[query, : len(order)], row[order], rtol=1e-6)
  assert ids[-1].tolist() == [-1] * 6 and np.isneginf(scores[-1]).all()


def test_of_a_frequent_word_only_the_items_in_which_it_weighs_most_are_kept():
  items = ["shoe one two three", "shoe", "shoe one", "hat"]
  index = LexicalIndex.build(_vectors(items, items), most_per_column=2)
  assert index.search(_vectors(["shoe"], items), 4)[1].tolist() == [[1, 2, -1, -1]]
  assert index.search(_vectors(["hat"], items), 2)[1].tolist() == [[3, -1]]
