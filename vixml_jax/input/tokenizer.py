"""Turns texts into token ids with a fast Hugging Face tokenizer."""

from collections.abc import Sequence
import hashlib
import itertools
import json
import os
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged


class Tokenizer:
  """Token ids with the model's special tokens, cut on the right; nothing is padded.

  Attributes:
    vocab_size: number of token ids, added tokens included.
    max_length: most tokens of a text, special tokens included.
    special_tokens: how many of them every text has.
    fingerprint: sha256 of everything that decides the ids of a text, in hex.
  """

  def __init__(self, path: str | os.PathLike, max_length: int):
    """Loads a tokenizer.

    Args:
      path: folder with `tokenizer.json`, or a name on the Hugging Face hub. No code is run from
        it; a folder is read without network.
      max_length: T, most tokens of a text.

    Raises:
      InputError: there is no fast tokenizer, or `max_length` leaves no room for text.
    """
    tokenizer = load_fast(os.fspath(path))
    self.special_tokens = tokenizer.num_special_tokens_to_add()
    if max_length <= self.special_tokens:
      raise InputError(
        f"max_length {max_length} leaves no room for text: the tokenizer {path} "
        f"adds {self.special_tokens} special tokens"
      )
    self.vocab_size = len(tokenizer)
    self.max_length = max_length
    self._backend = tokenizer.backend_tokenizer
    self._backend.no_padding()
    self._backend.enable_truncation(max_length, direction="right")
    self.fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()

  def __call__(self, texts: Sequence[str]) -> Ragged:
    """Tokenizes a batch of texts on all cores; row i holds the int32 ids of text i."""
    ids = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]
    lengths = [len(row) for row in ids]
    return Ragged.of_lengths(np.fromiter(itertools.chain.from_iterable(ids), np.int32, sum(lengths)), lengths)

  def uncut(self, text: str) -> tuple[int, ...]:
    """Ids of one text however long it is, special tokens included."""
    self._backend.no_truncation()
    ids = self._backend.encode(text).ids
    self._backend.enable_truncation(self.max_length, direction="right")
    return tuple(ids)

  def token_id(self, token: str) -> int | None:
    """Id of the token of this name, such as `<|endoftext|>`; None if there is none."""
    return self._backend.token_to_id(token)


def load_fast(path: str) -> Any:
  """The tokenizer of transformers that lies in a folder, or on the hub; arguments and errors as of `Tokenizer`."""
  local = os.path.isdir(path)
  if local and not os.path.isfile(os.path.join(path, "tokenizer.json")):
    raise InputError(
      f"{path}: no tokenizer.json in this folder; set encoder.pretrained to a "
      "folder that holds a fast Hugging Face tokenizer"
    )
  # On import it advises to install torch, which nothing here needs, and takes seconds.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import AutoTokenizer

  try:
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local, trust_remote_code=False)
  except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
    raise InputError(
      f"{path}: no tokenizer can be loaded ({_first_line(error)}); set "
      "encoder.pretrained to a folder or a hub name that has one"
    ) from error
  if not tokenizer.is_fast:
    raise InputError(f"{path}: its tokenizer has no fast version (tokenizer.json); save it as one")
  return tokenizer


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
