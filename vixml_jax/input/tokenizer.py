"""Converts texts to token ids with a fast Hugging Face tokenizer."""

from collections.abc import Sequence
import hashlib
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged

_log = logging.getLogger(__name__)


class Tokenizer:
  """A tokenizer that adds the special tokens of the model, truncates on the right and does not pad.

  Attributes:
    vocab_size: Number of token ids, added tokens included.
    max_length: Maximum number of tokens of a text, special tokens included.
    special_tokens: Number of special tokens of every text.
    fingerprint: sha256 in hex of everything that decides the token ids of a text.
  """

  def __init__(self, path: str | os.PathLike[str], max_length: int, num_vectors: int | None = None):
    """Loads a tokenizer.

    Args:
      path: Folder with `tokenizer.json`, or a name on the Hugging Face hub. No code from it is executed, and a folder
        is read without network.
      max_length: Maximum number of tokens of a text, special tokens included.
      num_vectors: Number of tokens for which the model has a vector. Special tokens with larger ids, such as Gemma 3's
        placeholder of images, are then removed with a warning, so that they are text like any other. None to keep all.

    Raises:
      InputError: The folder or the hub has no fast tokenizer, or `max_length` leaves no room for text.
    """
    tokenizer = load_fast(os.fspath(path))
    self.special_tokens = tokenizer.num_special_tokens_to_add()
    if max_length <= self.special_tokens:
      raise InputError(
        f"max_length {max_length} leaves no room for text: the tokenizer {path} adds {self.special_tokens} special "
        "tokens; raise dataset.max_length"
      )
    self.max_length = max_length
    self._backend = _with_vectors(tokenizer.backend_tokenizer, num_vectors, path)
    self.vocab_size = self._backend.get_vocab_size()
    self._backend.no_padding()
    self._backend.enable_truncation(max_length, direction="right")
    self.fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()

  def __call__(self, texts: Sequence[str]) -> Ragged:
    """Tokenizes texts on all cores. Row i of the result has the token ids of text i, int32.

    White space at both ends of a text is removed first, as in the published code. It would be a token of its own for
    the tokenizers of decoders.
    """
    ids = [encoding.ids for encoding in self._backend.encode_batch_fast([text.strip() for text in texts])]
    lengths = [len(row) for row in ids]
    return Ragged.of_lengths(np.fromiter(itertools.chain.from_iterable(ids), np.int32, sum(lengths)), lengths)

  def uncut(self, text: str) -> tuple[int, ...]:
    """Returns the token ids of a text of any length without truncation, special tokens included."""
    self._backend.no_truncation()
    ids = self._backend.encode(text).ids
    self._backend.enable_truncation(self.max_length, direction="right")
    return tuple(ids)

  def token_id(self, token: str) -> int | None:
    """Returns the id of a token such as `<|endoftext|>`, or None if the vocabulary does not have it."""
    return self._backend.token_to_id(token)


def _with_vectors(backend: Any, num_vectors: int | None, path: str | os.PathLike[str]) -> Any:
  """Returns a tokenizer without the special tokens whose ids are `num_vectors` or larger."""
  added = {} if num_vectors is None else backend.get_added_tokens_decoder()
  removed = {token.content for index, token in added.items() if token.special and index >= num_vectors}
  if not removed:
    return backend
  _log.warning("%s: the model has no vectors for the tokens %s; in texts, they are words", path, ", ".join(removed))
  state = json.loads(backend.to_str())
  state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in removed]
  if isinstance(state["model"].get("vocab"), dict):
    state["model"]["vocab"] = {word: index for word, index in state["model"]["vocab"].items() if word not in removed}
  return type(backend).from_str(json.dumps(state))


def load_fast(path: str) -> Any:
  """Loads the tokenizer of transformers from a folder or from the hub.

  Args:
    path: Folder with `tokenizer.json`, or a name on the Hugging Face hub.

  Raises:
    InputError: The folder or the hub has no fast tokenizer.
  """
  local = Path(path).is_dir()
  if local and not (Path(path) / "tokenizer.json").is_file():
    raise InputError(
      f"{path}: no tokenizer.json in this folder; set encoder.pretrained to a folder with a fast Hugging Face tokenizer"
    )
  # The import takes seconds. Without this variable it advises to install torch, which this package does not use.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import AutoTokenizer

  try:
    # nosec B615 below: `source.resolve` has fetched the revision that the config names.
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local, trust_remote_code=False)  # nosec B615
  except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
    raise InputError(
      f"{path}: no tokenizer can be loaded ({_first_line(error)}); set encoder.pretrained to a folder or a hub name "
      "that has one"
    ) from error
  if not tokenizer.is_fast:
    raise InputError(f"{path}: its tokenizer has no fast version (tokenizer.json); save one with transformers")
  return tokenizer


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
