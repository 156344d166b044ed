"""Parses the template of a prompt, such as "T E I V eos": the phrases around the text and the images of an item."""

from collections.abc import Collection, Mapping

from vixml_jax.errors import InputError
from vixml_jax.input.packing import Phrase, PromptPart, without_images
from vixml_jax.input.tokenizer import Tokenizer


def template_words(template: str, phrases: Collection[str], images: bool) -> list[str]:
  """Splits a template into words and checks them, without a tokenizer.

  Args:
    template: Words separated by spaces: E for the tokens of the text, V for the image tokens, eos for the token that
      ends an item, and names of phrases.
    phrases: Names of the phrases.
    images: Whether images are tokens of the items (early fusion).

  Raises:
    InputError: A word is unknown or repeated, images have no place, or items would consist of phrases only.
  """
  words = template.split()
  for i, word in enumerate(words):
    if word not in {"E", "V", "eos", *phrases}:
      raise InputError(
        f"config.prompt.template={template!r}: unknown word {word}; use E (text), V (images), eos and the phrases "
        f"{', '.join(phrases)}"
      )
    if word in words[:i]:
      raise InputError(f"config.prompt.template={template!r}: {word} occurs twice; use it once")
  if images and "V" not in words:
    raise InputError(f"config.prompt.template={template!r}: no place for the images; add V, or set config.images=0")
  if not images and "E" not in words:
    raise InputError(f"config.prompt.template={template!r}: no place for the text, and images are not tokens; add E")
  return words


def parse_template(
  template: str, phrases: Mapping[str, str], eos: str, tokenizer: Tokenizer, images: bool
) -> tuple[PromptPart, ...]:
  """Converts a template to the parts of an item, the `template` of a `PackedLayout`.

  The phrase directly before V introduces the images. An item without images has neither V nor this phrase; all other
  phrases belong to the text and are in every item. So without images "T E I V eos" becomes "T E eos", and
  "I V T2 E eos" becomes "T2 E eos". In a model without images every item has this form.

  Each phrase is tokenized on its own, as texts are: without a space before or after it, and with the special tokens
  that the tokenizer adds to a text (none for Qwen, the first token for Llama). Adjacent pieces are therefore not
  merged: "This product text" and "title" do not give the token " title". The paper's code does the same. It differs in
  two ways: it keeps the phrase of the images in items without images, while here such an item equals a text-only one;
  and it tokenizes eos like a phrase, with the first token of Llama's tokenizer, while here eos is a single token.

  Args:
    template: Words separated by spaces; see `template_words`.
    phrases: Texts of the phrases by name.
    eos: Token for which eos stands. The paper uses `<|endoftext|>`; the `eos_token` of instruct models is another one.
    tokenizer: Tokenizer of the texts.
    images: Whether images are tokens of the items (early fusion).

  Raises:
    InputError: `template_words` refuses the template, a phrase is empty, or the tokenizer has no token `eos`.
  """
  words = template_words(template, phrases, images)
  parts = tuple(
    _part(word, following == "V", phrases, eos, tokenizer)
    for word, following in zip(words, [*words[1:], ""], strict=True)
  )
  return parts if images else without_images(parts)


def _part(word: str, for_images: bool, phrases: Mapping[str, str], eos: str, tokenizer: Tokenizer) -> PromptPart:
  """Returns the part for which a word stands."""
  if word == "E":
    return "text"
  if word == "V":
    return "images"
  if word != "eos":
    if not phrases[word].strip():
      raise InputError(f"config.prompt.phrases.{word}={phrases[word]!r}: is empty; remove {word} from prompt.template")
    return Phrase(tokenizer.uncut(phrases[word]), for_images)
  token = tokenizer.token_id(eos)
  if token is None:
    raise InputError(
      f"config.prompt.eos={eos!r}: the tokenizer has no such token; set it to the token that ends its texts, or remove "
      "eos from prompt.template"
    )
  return Phrase((token,))
