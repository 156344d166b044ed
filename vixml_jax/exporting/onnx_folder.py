"""Writes a folder with the encoder as an ONNX model, its tokenizer, its image tower, and how to use them."""

from pathlib import Path
from typing import Any

from vixml_jax.exporting.item_tokenizer import max_item_length, save_item_tokenizer
from vixml_jax.exporting.onnx_tower import write_onnx_tower
from vixml_jax.files import sha256_of_file, write_json
from vixml_jax.inference.onnx_conversion import to_int8, to_onnx
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.input.packing import PackedLayout, Phrase, without_images
from vixml_jax.onnx_models.bert import ATTENTION_MASK, EMBEDDINGS, INPUT_IDS, POOLED
from vixml_jax.onnx_models.image_fusion import IMAGE_FEATURES, IMAGE_PLACES
from vixml_jax.onnx_models.quantization import weight_bits
from vixml_jax.run.workdir import TOKENIZER

_MODELS = {"float32": "model.onnx", "int8": "model_int8.onnx"}

_INFO = "onnx.json"


def write_onnx_folder(
  encoder: TrainedEncoder, folder: Path, dtype: str, image_checkpoint: str | None = None
) -> dict[str, Any]:
  """Writes `model.onnx` or `model_int8.onnx`, the tokenizer, the image tower if there is one, and `onnx.json`.

  The model gives texts, with their images if the model reads any, the embeddings of evaluation.

  Args:
    encoder: The encoder; see `texts_only.check_has_text`.
    folder: Folder to write the files to.
    dtype: One of `DTYPES_OF["onnx"]`.
    image_checkpoint: The tower that made the run's image features; None for the recorded one.

  Returns:
    What the model card needs to know: the contents of `onnx.json`.

  Raises:
    InputError: The model cannot be an ONNX model, the tower is not the one of the training data, or onnx or, for int8,
      onnxruntime is not installed.
  """
  path, bits, cosine = folder / _MODELS[dtype], 32, None
  if dtype == "int8":
    bits = weight_bits()
    content, cosine = to_int8(encoder)
    path.write_bytes(content)
  else:
    path.write_bytes(to_onnx(encoder).SerializeToString())
  template, config = without_images(encoder.layout.template), encoder.config.dataset
  save_item_tokenizer(encoder.workdir / TOKENIZER, template, config.max_length, folder)
  info = {
    "model": path.name,
    "sha256": sha256_of_file(path),
    "inputs": [INPUT_IDS, ATTENTION_MASK, *([IMAGE_FEATURES, IMAGE_PLACES] if encoder.images else [])],
    "outputs": [EMBEDDINGS, POOLED],
    "dim": encoder.definition.embed_dim,
    "max_length": max_item_length(template, config.max_length),
    "weight_bits": bits,
    "cosine_to_float32": cosine,
    "checkpoint": encoder.checkpoint,
    "images": None,
  }
  if encoder.images:
    tower = write_onnx_tower(encoder.config, encoder.image_origin, image_checkpoint, folder)
    info["images"] = _image_info(encoder) | {"tower": tower}
  write_json(folder / _INFO, info)
  return info


def _image_info(encoder: TrainedEncoder) -> dict[str, Any]:
  """Returns how images enter an item; `tokens` is None if they are not tokens of it."""
  tokens = _image_tokens(encoder.layout) if "images" in encoder.layout.template else None
  return {"most": encoder.images, "feature_dim": encoder.feature_dim, "tokens": tokens}


def _image_tokens(layout: PackedLayout) -> dict[str, Any]:
  """Returns which tokens images add to those of the tokenizer, and where: after `before` tokens, or before `after`."""
  place = layout.template.index("images")
  sides = (layout.template[:place], layout.template[place + 1 :])
  phrase = [token for part in sides[0] if isinstance(part, Phrase) and part.for_images for token in part.ids]
  before, after = (
    None if "text" in side else sum(len(part.ids) for part in side if isinstance(part, Phrase) and not part.for_images)
    for side in sides
  )
  return {"phrase": phrase, "before": before, "after": None if before is not None else after}
