"""Writes a folder with the encoder, its adapters merged, that `transformers.AutoModel` loads."""

from collections.abc import Mapping
import json
import logging
from pathlib import Path
import shutil
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.input.packing import without_images
from vixml_jax.models.decoder import embedding_scale
from vixml_jax.models.lora import lora_scale, merge_lora
from vixml_jax.models.parameters import join_params
from vixml_jax.run.workdir import TOKENIZER
from vixml_jax.typing import Tree
from vixml_jax.weights import hf_config
from vixml_jax.weights.hf_folder import save_pretrained
from vixml_jax.weights.tables import TABLES

_log = logging.getLogger(__name__)

_TRANSFORMERS_CLASSES = {
  "bert": "BertModel",
  "distilbert": "DistilBertModel",
  "qwen2": "Qwen2Model",
  "qwen3": "Qwen3Model",
  "llama": "LlamaModel",
  "gemma3_text": "Gemma3TextModel",
}


def write_transformers_folder(
  encoder: TrainedEncoder, folder: Path, dtype: str, max_shard_bytes: int
) -> dict[str, Any]:
  """Writes the encoder with merged adapters and the tokenizer of texts. The template of items is not applied.

  Args:
    encoder: The encoder.
    folder: Folder to write the files to.
    dtype: Type of the weights.
    max_shard_bytes: Maximum size of one file of weights.

  Returns:
    What the model card needs to know: `pooling`, `template`, and whether an item without images `is_text`, so that
    nothing is put around its tokens.
  """
  write_model(encoder, folder, dtype, max_shard_bytes)
  copy_tokenizer(encoder.workdir, folder)
  pooling, template = encoder.config.encoder.pooling, encoder.config.prompt.template
  _log.info(
    "the folder has the encoder alone: an embedding is the %s of its hidden states over an item's tokens "
    "(prompt.template %r), at unit norm",
    "last" if pooling == "last" else "mean",
    template,
  )
  is_text = without_images(encoder.layout.template) == ("text",)
  return {"pooling": pooling, "template": template, "is_text": is_text, "max_length": encoder.config.dataset.max_length}


def copy_tokenizer(workdir: Path, folder: Path) -> None:
  """Copies the tokenizer of a run."""
  for path in (workdir / TOKENIZER).iterdir():
    if path.name != "config.json":  # That of the model is written.
      shutil.copyfile(path, folder / path.name)


def write_model(encoder: TrainedEncoder, folder: Path, dtype: str, max_shard_bytes: int) -> None:
  """Writes config.json and weights."""
  config = _model_config(encoder, dtype)
  save_pretrained(
    _merged(encoder, dtype),
    folder,
    config,
    TABLES[config["model_type"]],
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
    zeros=_unused(config["model_type"], encoder.definition.embed_dim),
  )


def _unused(model_type: str, embed_dim: int) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of tensors that transformers has and the encoder lacks.

  transformers would draw them at random and report that at every load. With zeros, `pooler_output` is zero.
  """
  return (
    {"pooler.dense.weight": (embed_dim, embed_dim), "pooler.dense.bias": (embed_dim,)} if model_type == "bert" else {}
  )


def _model_config(encoder: TrainedEncoder, dtype: str) -> dict[str, Any]:
  """Returns the pretrained encoder's config.json if it agrees with the run's config, else one made from the latter."""
  arguments = encoder.definition.arguments["encoder"]
  config = hf_config.config_of(arguments)
  changed: dict[str, Any] = {"architectures": [_TRANSFORMERS_CLASSES[config["model_type"]]], "dtype": dtype}
  if arguments.get("bidirectional"):
    keys = hf_config.bidirectional_keys(config["model_type"])
    changed |= keys
    _log.warning(
      "attention of this model is bidirectional: config.json has %s, which older versions of transformers do not read "
      "(before 5.2)",
      ", ".join(f"{key}={json.dumps(value)}" for key, value in keys.items()),
    )
  folder = encoder.workdir / TOKENIZER
  try:
    original = hf_config.read_config(folder)
    hf_config.check_arguments(folder, arguments)
  except InputError:  # It does not exist, or the tokenizer is that of another model.
    return config | changed
  # A path of another machine, and code and dtype of the original weights.
  dropped = ("_name_or_path", "auto_map", "torch_dtype")
  kept = {key: value for key, value in original.items() if key not in dropped}
  return (kept if original["model_type"] == config["model_type"] else config) | changed


def _merged(encoder: TrainedEncoder, dtype: str) -> Tree:
  """Returns the encoder's parameters for weights of a dtype. Adapters are added to a kernel when it is read.

  They are added to the kernels that they were trained with: those of a quantized base are dequantized, and not read
  from the original weights again, from which they differ by rounding.
  """
  params = join_params(encoder.params, encoder.frozen)["encoder"]
  arguments = encoder.definition.arguments["encoder"]
  if arguments.get("scale_embedding"):
    table = params["word_embedding"]
    trained, theirs = (float(embedding_scale(arguments["embed_dim"], kind)) for kind in (table.dtype, dtype))
    if trained != theirs:
      params = params | {"word_embedding": _ScaledTable(table, trained / theirs)}
  if not arguments.get("lora_rank"):
    return params
  return _merge(params, lora_scale(arguments["lora_rank"], arguments["lora_alpha"]))


def _merge(params: Mapping[str, Any], scale: float) -> Tree:
  merged = {name: _merge(value, scale) if isinstance(value, dict) else value for name, value in params.items()}
  if "lora_a" in merged:
    names = ("kernel", "kernel_scale", "lora_a", "lora_b")
    matrices = {name: merged.pop(name) for name in names if name in merged}
    merged["kernel"] = _MergedKernel(matrices, scale)
  return merged


class _ScaledTable:
  """Word vectors in float32 times the quotient of the scales that training and transformers multiply them by.

  Both are sqrt(D), but rounded to the dtype of the word vectors.
  """

  def __init__(self, table: Any, factor: float):
    self._table, self._factor = table, np.float32(factor)
    self.shape = table.shape

  def __getitem__(self, index: Any) -> np.ndarray:
    return np.asarray(self._table[index]).astype(np.float32) * self._factor


class _MergedKernel:
  """A kernel plus its adapter in float32, computed one layer at a time: the host may not hold a large base twice."""

  def __init__(self, matrices: Tree, scale: float):
    self._matrices, self._scale = matrices, scale
    self.shape = matrices["kernel"].shape

  def __getitem__(self, index: Any) -> np.ndarray:
    matrices = {name: value[index] for name, value in self._matrices.items()}
    if "kernel_scale" not in matrices:
      matrices["kernel"] = matrices["kernel"].astype(np.float32)
    return np.asarray(merge_lora(matrices, self._scale)["kernel"])
