"""Tokenizers: the same ids in any batch, and one line for a folder or a name that has none."""

import numpy as np
import pytest

from tests.helpers import miniature, tiny_tokenizers
from vixml_jax.errors import InputError
from vixml_jax.input.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return miniature.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_hub_name_that_cannot_be_reached_is_named():
  with pytest.raises(InputError, match="nobody/nothing: no tokenizer can be loaded"):
    Tokenizer("nobody/nothing", 6)


def test_tokenizer_gives_the_same_ids_in_any_batch(folder):
  tokenizer = Tokenizer(folder, 5)
  texts = ["arrow left circle square", "", "Cloud!"]
  whole = tokenizer(texts)
  for row, text in enumerate(texts):
    np.testing.assert_array_equal(whole[row], tokenizer([text]).values)
  assert len(tokenizer([])) == 0


def test_white_space_at_the_ends_of_a_text_gives_no_token(tmp_path):
  tokenizer = Tokenizer(tiny_tokenizers.write_byte_bpe(tmp_path), 12)
  plain = tokenizer(["text title"]).values
  inner = tokenizer(["text  title"]).values
  assert tokenizer.uncut(" text title\n") != tuple(plain), "the tokenizer itself keeps white space"
  for text in (" text title", "text title ", "\ttext title\n", "\u00a0text title"):
    np.testing.assert_array_equal(tokenizer([text]).values, plain)
  assert len(inner) > len(plain)


def test_unusable_tokenizer_or_length_is_named(folder, tmp_path):
  with pytest.raises(InputError, match="max_length 2 leaves no room for text"):
    Tokenizer(folder, 2)
  with pytest.raises(InputError, match="no tokenizer.json in this folder"):
    Tokenizer(tmp_path, 6)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(InputError, match="no tokenizer can be loaded"):
    Tokenizer(tmp_path, 6)


def test_special_tokens_without_a_vector_are_words_of_a_text(tmp_path, caplog):
  (tmp_path / "plain").mkdir()
  plain = Tokenizer(tiny_tokenizers.write_byte_bpe(tmp_path / "plain", begin="<bos>"), 30)
  (tmp_path / "last").mkdir()
  folder = tiny_tokenizers.write_byte_bpe(tmp_path / "last", begin="<bos>", last="<image>")
  number = plain.vocab_size
  whole = Tokenizer(folder, 30, number + 1)
  assert whole.vocab_size == number + 1 and whole.uncut("a <image>")[-1] == number and not caplog.records
  cut = Tokenizer(folder, 30, number)
  assert f"{folder}: the model has no vectors for the tokens <image>; in texts, they are words" in caplog.text
  assert cut.vocab_size == number and cut.token_id("<image>") is None and cut.special_tokens == 1
  for text in ("a <image>", "title of an image <bos>"):
    np.testing.assert_array_equal(cut([text]).values, plain([text]).values)
  assert cut.fingerprint == plain.fingerprint
  # A tokenizer with too many words does not fit the model.
  assert Tokenizer(folder, 30, 100).vocab_size > 100
