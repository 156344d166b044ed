"""Templates of prompts against the pieces that transformers' tokenizer makes, joined by hand."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.helpers import miniature, tiny_tokenizers
from tests.helpers.tiny_tokenizers import END_OF_TEXT, END_OF_TURN
from vixml_jax.errors import InputError
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, Phrase, pack
from vixml_jax.input.prompt import parse_template, template_words
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.ragged import Ragged

PHRASES = {"T": "This product text", "I": "and its image", "I1": "This product image", "T2": "and its text"}
# The ablation of prompts in ViXML (arXiv 2511.13189), and what remains of each for an item without images.
ABLATION = {
  "E": "E",
  "T E": "T E",
  "T E eos": "T E eos",
  "V E eos": "E eos",
  "E V eos": "E eos",
  "I1 V T2 E eos": "T2 E eos",
  "T E I V eos": "T E eos",
}
TITLES = ["title of an image", "", "text", "its title"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_tokenizers.write_byte_bpe(tmp_path_factory.mktemp("bpe"))


def ids(tokenizer, text):
  """transformers' tokens of one piece by itself, special ones included; an empty text has no others."""
  return list(tokenizer(text)["input_ids"])


def joined(tokenizer, template, title, images):
  """The input of the published code: concatenated tokens of separately tokenized pieces; -1 - row is an image."""
  pieces = {name: ids(tokenizer, text) for name, text in PHRASES.items()} | {
    "E": ids(tokenizer, title),
    "V": [-1 - row for row in images],
    "eos": [tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
  }
  return [token for word in template.split() for token in pieces[word]]


def packed_rows(items, layout):
  """The tokens of each item in its row, with -1 - row for an image."""
  packed = pack(items, layout)
  tokens, segments = (x.reshape(-1, layout.row_length) for x in (packed.tokens, packed.segments))
  if packed.images is not None:
    rows, owners, places = (
      x.reshape(len(tokens), -1) for x in (packed.images.rows, packed.images.segments, packed.images.positions)
    )
    row, place = np.nonzero(owners)
    tokens[row, places[row, place]] = -1 - rows[row, place]
  where = [divmod(int(slot), layout.slots) for slot in packed.slots]
  return [tokens[row][segments[row] == slot + 1].tolist() for row, slot in where]


@pytest.mark.parametrize("begin", ["", "<|begin|>"])
@pytest.mark.parametrize("template", ABLATION)
def test_every_prompt_of_the_ablation_equals_its_pieces_tokenized_separately(tmp_path, template, begin):
  folder = tiny_tokenizers.write_byte_bpe(tmp_path, begin)
  theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder, 16)
  assert ours.special_tokens == len(ids(theirs, "")) == bool(begin)
  images = [[7, 8, 9], [], [4], [5, 6]] if "V" in template else [[]] * 4
  in_row = "V" in template
  parts = parse_template(template, PHRASES, END_OF_TEXT, ours, in_row)
  layout = PackedLayout(64, 2, 3 if in_row else 0, parts, ours.special_tokens)
  found = packed_rows(Items(ours(TITLES), Ragged.from_rows(images)), layout)
  assert found == [
    joined(theirs, template if rows else ABLATION[template], title, rows)
    for title, rows in zip(TITLES, images, strict=True)
  ]


@pytest.mark.parametrize("template", ABLATION)
def test_a_model_without_images_has_the_form_without_images(folder, template):
  tokenizer = Tokenizer(folder, 16)
  found = parse_template(template, PHRASES, END_OF_TEXT, tokenizer, images=False)
  assert found == parse_template(ABLATION[template], PHRASES, END_OF_TEXT, tokenizer, images=False)
  assert found.count("text") == 1


def test_tokens_of_phrases_and_texts_are_not_merged(folder):
  tokenizer = Tokenizer(folder, 16)
  phrase, _ = parse_template("T E", PHRASES, END_OF_TEXT, tokenizer, images=False)
  apart = [*phrase.ids, *tokenizer(["title"]).values.tolist()]
  assert apart != list(tokenizer.uncut("This product text title"))
  assert AutoTokenizer.from_pretrained(folder).decode(apart) == "This product texttitle"


def test_eos_is_the_configured_token_not_that_of_the_tokenizer(folder):
  tokenizer, theirs = Tokenizer(folder, 16), AutoTokenizer.from_pretrained(folder)
  for name in (END_OF_TEXT, END_OF_TURN):
    wanted = Phrase((theirs.convert_tokens_to_ids(name),))
    assert parse_template("E eos", {}, name, tokenizer, images=False) == ("text", wanted)
  assert theirs.eos_token == END_OF_TURN


def test_long_phrases_are_not_truncated_and_texts_are(folder):
  tokenizer = Tokenizer(folder, 4)
  long = "This product text " * 5
  parts = parse_template("T E", {"T": long}, END_OF_TEXT, tokenizer, images=False)
  assert list(parts[0].ids) == ids(AutoTokenizer.from_pretrained(folder), long) and len(parts[0].ids) > 4
  assert tokenizer([long]).lengths.tolist() == [4]


def test_encoders_keep_their_special_tokens_around_the_text(tmp_path):
  tokenizer = Tokenizer(miniature.write_tokenizer(tmp_path), 8)
  assert tokenizer.special_tokens == 2
  assert parse_template("V E", {}, "", tokenizer, images=True) == ("images", "text")
  assert parse_template("V E", {}, "", tokenizer, images=False) == ("text",)


@pytest.mark.parametrize(
  "template,images,message",
  [
    ("T E X", False, "unknown word X; use E .text., V .images., eos and the phrases T, I"),
    ("T text", False, "unknown word text"),
    ("E E", False, "E occurs twice"),
    ("V E V", True, "V occurs twice"),
    ("T T E", False, "T occurs twice"),
    ("T E eos", True, "no place for the images; add V"),
    ("T eos", False, "no place for the text"),
    ("V eos", False, "no place for the text"),
    ("", False, "no place for the text"),
    ("", True, "no place for the images"),
  ],
)
def test_a_bad_template_is_refused_before_any_tokenizer_is_read(template, images, message):
  with pytest.raises(InputError, match=f"config.prompt.template='{template}': {message}"):
    template_words(template, PHRASES, images)


def test_an_empty_phrase_and_an_unknown_eos_are_refused(folder, tmp_path):
  with pytest.raises(InputError, match="config.prompt.phrases.T=' ': is empty; remove T"):
    parse_template("T E", {"T": " "}, END_OF_TEXT, Tokenizer(folder, 8), images=False)
  with pytest.raises(InputError, match="config.prompt.eos='<.endoftext.>': the tokenizer has no such token"):
    parse_template("E eos", {}, END_OF_TEXT, Tokenizer(miniature.write_tokenizer(tmp_path), 8), images=False)
