"""Texts are found by row and by text, also when hashes are equal."""

import numpy as np
import pytest

from vixml_jax.search.text_table import TextTable


def test_texts_are_found_by_text_and_duplicates_by_their_last_row():
  texts = ["", "a", "ü", "ab", "ba", "a", "a" * 300]
  assert TextTable.from_texts(texts).find(["ba", "a", "ü", "", "x", "a" * 300]).tolist() == [4, 5, 2, 0, -1, 6]
  assert TextTable.from_texts(texts).first_duplicate() == "a"
  assert TextTable.from_texts(texts[:5]).first_duplicate() is None


def test_different_texts_of_equal_hash_are_told_apart():
  # Polynomial hashes modulo 2**64 of a Thue-Morse word and its complement are equal for every odd factor.
  parities = [bin(i).count("1") % 2 for i in range(2048)]
  word, complement, other = ("".join(letters[parity] for parity in parities) for letters in ("ab", "ba", "ac"))
  table = TextTable.from_texts([word, other, complement])
  assert table.find([complement, word, "a"]).tolist() == [2, 0, -1]
  assert TextTable.from_texts([word, other]).find([complement]).tolist() == [-1]
  assert table.first_duplicate() is None
  assert TextTable.from_texts([word, complement, word]).first_duplicate() == word


def test_rows_out_of_range_are_refused():
  with pytest.raises(IndexError, match="0 to 1, not -1 to 0"):
    TextTable.from_texts(["a", "b"]).take([0, -1])


def test_an_empty_table_finds_nothing():
  assert TextTable.from_texts([]).find(["a"]).tolist() == [-1]
  assert TextTable.from_texts([]).take(np.zeros(0, int)) == []
