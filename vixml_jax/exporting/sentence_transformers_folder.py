"""Writes a folder that `sentence_transformers.SentenceTransformer` loads and that encodes texts as evaluation does."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.exporting.item_tokenizer import max_item_length, save_item_tokenizer
from vixml_jax.exporting.transformers_folder import write_model
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.input.packing import without_images
from vixml_jax.run.workdir import TOKENIZER

_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))


def write_sentence_transformers_folder(
  encoder: TrainedEncoder, folder: Path, dtype: str, max_shard_bytes: int
) -> dict[str, Any]:
  """Writes weights, the tokenizer of whole items, pooling and normalization.

  Args:
    encoder: The encoder; see `texts_only.check_encodes_texts`.
    folder: Folder to write the files to.
    dtype: Type of the weights.
    max_shard_bytes: Maximum size of one file of weights.

  Returns:
    What the model card needs to know: `max_length`, in tokens.
  """
  write_model(encoder, folder, dtype, max_shard_bytes)
  template, max_length = without_images(encoder.layout.template), encoder.config.dataset.max_length
  save_item_tokenizer(encoder.workdir / TOKENIZER, template, max_length, folder)
  longest = max_item_length(template, max_length)
  _write_modules(folder, encoder.definition.embed_dim, encoder.config, longest)
  return {"max_length": longest}


def _write_modules(folder: Path, embed_dim: int, config: ConfigDict, max_seq_length: int) -> None:
  """Writes the files that make a folder of transformers one of sentence-transformers, by names all versions read."""
  last = config.encoder.pooling == "last"
  files = {
    "modules.json": [
      {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
      for i, (name, path) in enumerate(_MODULES)
    ],
    "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    "1_Pooling/config.json": {
      "word_embedding_dimension": embed_dim,
      "pooling_mode_cls_token": False,  # nosec B105 - a token of a text.
      "pooling_mode_mean_tokens": not last,
      "pooling_mode_max_tokens": False,
      "pooling_mode_mean_sqrt_len_tokens": False,
      "pooling_mode_weightedmean_tokens": False,
      "pooling_mode_lasttoken": last,
      "include_prompt": True,
    },
  }
  for _, path in _MODULES:
    (folder / path).mkdir(exist_ok=True)
  for name, value in files.items():
    (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
