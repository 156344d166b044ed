"""Reads the template of a prompt, such as "T E I V eos": which phrases stand around an item's text and images."""

from collections.abc import Collection, Mapping

from vixml_jax.errors import InputError
from vixml_jax.input.packing import Phrase, PromptPart, without_images
from vixml_jax.input.tokenizer import Tokenizer


def template_words(template: str, phrases: Collection[str], images: bool) -> list[str]:
  """The words of a template, checked; needs no tokenizer.

  Args:
    template: words with spaces between them: E for the text's tokens, V for the image tokens, eos for the token that
      ends an item, and names of phrases.
    phrases: the names of phrases.
    images: whether images are tokens of the items (early fusion).

  Raises:
    InputError: for an unknown or repeated word, images without a place, or items of nothing but phrases.
  """
  words = template.split()
  for i, word in enumerate(words):
    if word not in {"E", "V", "eos", *phrases}:
      raise InputError(
        f"config.prompt.template={template!r}: unknown word {word}; known are E (text), V "
        f"(images), eos and the phrases {', '.join(phrases)}"
      )
    if word in words[:i]:
      raise InputError(f"config.prompt.template={template!r}: {word} stands twice; give it once")
  if images and "V" not in words:
    raise InputError(f"config.prompt.template={template!r}: no place for the images; add V, or set images to 0")
  if not images and "E" not in words:
    raise InputError(f"config.prompt.template={template!r}: no place for the text, and no images are tokens; add E")
  return words


def parse_template(
  template: str, phrases: Mapping[str, str], eos: str, tokenizer: Tokenizer, images: bool
) -> tuple[PromptPart, ...]:
  """Turns a template into the parts of an item, as `PackedLayout` takes them.

  The phrase directly before V introduces the images: it is left out, like V, of an item without images. All others
  belong to the text and stand in every item. So "T E I V eos" becomes "T E eos" for an item without images,
  "I V T2 E eos" becomes "T2 E eos", and both are so for every item of a model without images.

  Each phrase is tokenized by itself, as texts are: without a space before or after it, and with the special tokens
  that the tokenizer adds to a text (none for Qwen, the first token for Llama). Pieces that meet are therefore not
  merged: "This product text" and "title" give no token " title". The paper's code does the same. It keeps the phrase
  of the images where there are none, which this does not: an item without images equals a text-only one. Also, eos is
  that one token here, without the first token that Llama's tokenizer would give it there.

  Args:
    template: words with spaces between them, as for `template_words`.
    phrases: name -> text.
    eos: name of the token that eos stands for. The paper's is `<|endoftext|>`; the `eos_token` of instruct models is
      another one.
    tokenizer: of the texts.
    images: whether images are tokens of the items (early fusion).

  Raises:
    InputError: for what `template_words` refuses, an empty phrase, or a tokenizer without the token `eos`.
  """
  words = template_words(template, phrases, images)
  parts = tuple(
    _part(word, following == "V", phrases, eos, tokenizer)
    for word, following in zip(words, [*words[1:], ""], strict=True)
  )
  return parts if images else without_images(parts)


def _part(word: str, beside_images: bool, phrases: Mapping[str, str], eos: str, tokenizer: Tokenizer) -> PromptPart:
  """One word's part."""
  if word == "E":
    return "text"
  if word == "V":
    return "images"
  if word != "eos":
    if not phrases[word].strip():
      raise InputError(
        f"config.prompt.phrases.{word}={phrases[word]!r}: says nothing; leave {word} out of prompt.template"
      )
    return Phrase(tokenizer.uncut(phrases[word]), beside_images)
  token = tokenizer.token_id(eos)
  if token is None:
    raise InputError(
      f"config.prompt.eos={eos!r}: the tokenizer has no such token; name the one that ends its texts, "
      "or leave eos out of prompt.template"
    )
  return Phrase((token,))
