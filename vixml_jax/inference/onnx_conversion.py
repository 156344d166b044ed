"""Converts a trained encoder to an ONNX model, and measures what rounding it to int8 costs."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from vixml_jax.encoding.item_encoder import normalize
from vixml_jax.errors import InputError
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.input.items import Items
from vixml_jax.input.packing import whole_items
from vixml_jax.onnx_models.bert import bert_model
from vixml_jax.onnx_models.calibration import random_items
from vixml_jax.onnx_models.quantization import int8_model
from vixml_jax.onnx_models.session import OnnxEncoder
from vixml_jax.rounding import at_equal_distances
from vixml_jax.run.workdir import INDEX
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.typing import Tree

_log = logging.getLogger(__name__)

_COMPARED_LABELS = 256
_LEAST_COSINE = 0.98  # Below this mean, a warning says that int8 may cost accuracy.


def check_convertible(workdir: Path, config: ConfigDict) -> None:
  """Checks that there is a graph for the encoder of a run; nothing is loaded.

  Raises:
    InputError: A part of the model has no graph; the message names the key.
  """
  refused = {
    "encoder.architecture": config.encoder.architecture != "bert" and config.encoder.architecture,
    "encoder.pooling": config.encoder.pooling != "mean" and config.encoder.pooling,
  }
  for key, value in refused.items():
    if value:
      raise InputError(
        f"{workdir}: a model with {key}={value} cannot be an ONNX model; encoders of the BERT family can, with mean "
        "pooling"
      )


def to_onnx(encoder: TrainedEncoder) -> Any:
  """Returns the encoder, with its images if it has any, as an `onnx.ModelProto` in float32; see `bert_model`.

  Raises:
    InputError: `check_convertible` refuses the model, or onnx is not installed.
  """
  check_convertible(encoder.workdir, encoder.config)
  return bert_model(_parameters(encoder), encoder.definition.arguments["encoder"])


class QuantizedModel(NamedTuple):
  """An encoder in int8.

  Attributes:
    content: The serialized ONNX model.
    cosine: Cosine of its embeddings to those of the encoder: `texts`, the number of texts that were compared, and
      `mean` and `least`. None if there were no texts.
  """

  content: bytes
  cosine: dict[str, float] | None


def to_int8(encoder: TrainedEncoder) -> QuantizedModel:
  """Returns the encoder as an ONNX model whose layers are in int8, compared on texts of labels in the index.

  Args:
    encoder: The encoder.

  Raises:
    InputError: As for `to_onnx`.
  """
  check_convertible(encoder.workdir, encoder.config)
  arguments, tokenizer = encoder.definition.arguments["encoder"], encoder.tokenizer
  special = tokenizer([""])[0].tolist()
  examples = random_items(arguments["vocab_size"], special, tokenizer.max_length, encoder.layout)
  content = int8_model(_parameters(encoder), arguments, examples)
  cosine = _cosine(encoder, OnnxEncoder(content))
  if cosine is not None:
    level = logging.INFO if cosine["mean"] >= _LEAST_COSINE else logging.WARNING
    _log.log(
      level,
      "int8 encoder of %s: the cosine of its embeddings to the unquantized ones is %.4f on average and at least %.4f "
      "(%d texts of labels)",
      encoder.workdir,
      cosine["mean"],
      cosine["least"],
      cosine["texts"],
    )
  return QuantizedModel(content, cosine)


def _parameters(encoder: TrainedEncoder) -> Tree:
  """Returns the parameters of the encoder on the host, with those of its images if it has any."""
  return jax.device_get({name: encoder.params[name] for name in ("encoder", "fusion") if name in encoder.params})


def _cosine(encoder: TrainedEncoder, rounded: OnnxEncoder) -> dict[str, float] | None:
  """Compares the embeddings of labels, as `QuantizedModel.cosine` says."""
  if not (encoder.workdir / INDEX).exists():
    return None
  index = LabelIndex.open(encoder.workdir / INDEX, checkpoint=encoder.checkpoint, search="exact")
  live = np.flatnonzero(~index.deleted)
  chosen = live[at_equal_distances(len(live), _COMPARED_LABELS)]
  tokens = encoder.tokenizer(index.texts(chosen))
  ours = encoder.embed(tokens)
  theirs = normalize(rounded.pooled(whole_items(Items.of_texts(tokens), encoder.layout)))
  cosines = np.sum(ours * theirs, axis=1)
  return {"texts": len(cosines), "mean": float(cosines.mean()), "least": float(cosines.min())}
