"""A tokenizer that turns texts into whole items: its own file has the phrases and the end of a prompt's template."""

import os
from typing import Any

from tokenizers import processors

from vixml_jax.input.packing import Phrase, PromptPart
from vixml_jax.input.tokenizer import load_fast

_NAMED = ("unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")


def max_item_length(template: tuple[PromptPart, ...], max_length: int) -> int:
  """Returns the largest number of tokens of an item without images.

  Args:
    template: Parts of an item.
    max_length: Largest number of tokens of a text, special ones included.
  """
  before, after = _around_text(template)
  return len(before) + max_length + len(after)


def save_item_tokenizer(
  tokenizer_folder: str | os.PathLike, template: tuple[PromptPart, ...], max_length: int, folder: str | os.PathLike
) -> None:
  """Writes a tokenizer that turns a text into the ids that a packed row has for an item with that text alone.

  Phrases and eos are put around the text by their ids, like special tokens. So they are never merged with the text, and
  a long text loses its end. A library that reads `tokenizer.json` needs no other file.

  Args:
    tokenizer_folder: Folder of the tokenizer that tokenized texts in training.
    template: Parts of an item without images, one of them the text; see `packing.without_images`.
    max_length: Largest number of tokens of a text, special ones included.
    folder: Folder to write `tokenizer.json` and `tokenizer_config.json` to.
  """
  # Imported after `load_fast`, which keeps transformers from advising to install torch.
  original = load_fast(os.fspath(tokenizer_folder))
  from transformers import PreTrainedTokenizerFast

  backend = original.backend_tokenizer
  backend.no_padding()
  backend.no_truncation()
  before, after = _around_text(template)
  first, last = _special_ids(backend)
  before, after = [*before, *first], [*last, *after]
  backend.post_processor = _template_processing(backend, before, after)
  named = {name: value for name in _NAMED if (value := getattr(original, name, None)) is not None}
  # Padding is always masked, so any token may stand for it if the tokenizer has no padding token.
  padding = original.pad_token or backend.id_to_token((after or before or [0])[-1])
  PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=padding,
    padding_side="right",
    truncation_side="right",
    model_max_length=max_item_length(template, max_length),
    **named,
  ).save_pretrained(folder)


def _around_text(template: tuple[PromptPart, ...]) -> tuple[list[int], list[int]]:
  """Returns the ids of the phrases before and after the text."""
  place = template.index("text")
  before, after = (
    [token for part in side if isinstance(part, Phrase) for token in part.ids]
    for side in (template[:place], template[place + 1 :])
  )
  return before, after


def _special_ids(backend: Any) -> tuple[list[int], list[int]]:
  """Returns the ids that a tokenizer puts before and after every text."""
  ids, bare = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
  start = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
  return ids[:start], ids[start + len(bare) :]


def _template_processing(backend: Any, before: list[int], after: list[int]) -> Any:
  sides = {"<before>": before, "<after>": after}
  special = [
    {"id": name, "ids": ids, "tokens": [backend.id_to_token(token) for token in ids]}
    for name, ids in sides.items()
    if ids
  ]
  single = " ".join([*(["<before>"] if before else []), "$A", *(["<after>"] if after else [])])
  return processors.TemplateProcessing(
    single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=special
  )
