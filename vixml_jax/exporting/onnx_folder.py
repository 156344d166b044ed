"""Writes a folder with the encoder as an ONNX model, its tokenizer, and how to use them."""

from pathlib import Path
from typing import Any

from vixml_jax.exporting.item_tokenizer import max_item_length, save_item_tokenizer
from vixml_jax.files import sha256_of_file, write_json
from vixml_jax.inference.onnx_conversion import to_int8, to_onnx
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.input.packing import without_images
from vixml_jax.onnx_models.bert import ATTENTION_MASK, EMBEDDINGS, INPUT_IDS, POOLED
from vixml_jax.onnx_models.quantization import weight_bits
from vixml_jax.run.workdir import TOKENIZER

_MODELS = {"float32": "model.onnx", "int8": "model_int8.onnx"}

_INFO = "onnx.json"


def write_onnx_folder(encoder: TrainedEncoder, folder: Path, dtype: str) -> dict[str, Any]:
  """Writes `model.onnx` or `model_int8.onnx`, the tokenizer and `onnx.json`.

  The model gives texts the embeddings of evaluation, like the format "sentence-transformers". It does not take images.

  Args:
    encoder: The encoder; see `texts_only.check_encodes_texts`.
    folder: Folder to write the files to.
    dtype: One of `DTYPES_OF["onnx"]`.

  Returns:
    What the model card needs to know: the contents of `onnx.json`.

  Raises:
    InputError: The model cannot be an ONNX model, or onnx or, for int8, onnxruntime is not installed.
  """
  path, bits, cosine = folder / _MODELS[dtype], 32, None
  if dtype == "int8":
    bits = weight_bits()
    content, cosine = to_int8(encoder, images=False)
    path.write_bytes(content)
  else:
    path.write_bytes(to_onnx(encoder).SerializeToString())
  template, config = without_images(encoder.layout.template), encoder.config.dataset
  save_item_tokenizer(encoder.workdir / TOKENIZER, template, config.max_length, folder)
  info = {
    "model": path.name,
    "sha256": sha256_of_file(path),
    "inputs": [INPUT_IDS, ATTENTION_MASK],
    "outputs": [EMBEDDINGS, POOLED],
    "dim": encoder.definition.embed_dim,
    "max_length": max_item_length(template, config.max_length),
    "weight_bits": bits,
    "cosine_to_float32": cosine,
    "checkpoint": encoder.checkpoint,
  }
  write_json(folder / _INFO, info)
  return info
