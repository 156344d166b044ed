"""Runs an ONNX encoder on the cores of this machine: batches of items of similar length, one core for each batch."""

from concurrent.futures import ThreadPoolExecutor
import os
from typing import Any

import numpy as np

from vixml_jax.input.packing import WholeItems
from vixml_jax.onnx_models.bert import ATTENTION_MASK, INPUT_IDS, POOLED
from vixml_jax.onnx_models.image_fusion import IMAGE_FEATURES, IMAGE_PLACES
from vixml_jax.onnx_models.libraries import import_library
from vixml_jax.ragged import ranges

# Tokens of a batch, padding included. Their activations stay in a core's caches.
_BATCH_TOKENS = 1024
# Tokens of padding of a batch. More cost as much as to start another batch.
_MOST_PADDING = 8


def new_session(model: bytes) -> Any:
  """Returns an `onnxruntime.InferenceSession` that runs a serialized model on the core of the thread that calls it.

  Raises:
    InputError: onnxruntime is not installed.
  """
  runtime = import_library("onnxruntime")
  options = runtime.SessionOptions()
  options.intra_op_num_threads = 1
  return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxEncoder:
  """Encodes items with a model of `bert_model`, quantized or not.

  Args:
    model: The serialized model.

  Attributes:
    dim: D, size of the outputs.

  Raises:
    InputError: onnxruntime is not installed.
  """

  def __init__(self, model: bytes):
    self._session = new_session(model)
    self.dim = int(self._session.get_outputs()[0].shape[1])
    shapes = {given.name: given.shape for given in self._session.get_inputs()}
    self._no_features = np.zeros((0, shapes[IMAGE_FEATURES][1])) if IMAGE_FEATURES in shapes else None
    self._cores = len(os.sched_getaffinity(0))
    self._pool = ThreadPoolExecutor(self._cores, "onnx")

  def pooled(self, items: WholeItems, features: np.ndarray | None = None) -> np.ndarray:
    """Returns encoder outputs before normalization, float32 [items, D].

    Batches run at the same time, each on one core, so that the cores never wait for each other within a batch.

    Args:
      items: Items to encode.
      features: Feature vectors of their images [images, F], those of the first item first; None if there are no images.
    """
    features = self._no_features if features is None else features
    out = np.empty((len(items.tokens), self.dim), np.float32)

    def run(rows: np.ndarray) -> None:
      (out[rows],) = self._session.run([POOLED], inputs_of(items, rows, features))

    parts = batches(items.tokens.lengths, self._cores)
    for _ in map(run, parts) if len(parts) == 1 else self._pool.map(run, parts):
      pass
    return out


def inputs_of(items: WholeItems, rows: np.ndarray, features: np.ndarray | None = None) -> dict[str, np.ndarray]:
  """Returns the inputs of a model for some of the items, padded on the right.

  Args:
    items: Items to encode.
    rows: Numbers of the items of the batch.
    features: Feature vectors of the images of all items [images, F]; None for a model of texts only.
  """
  tokens, images = items.tokens.take(rows), items.images
  mask = np.arange(max(tokens.lengths.max(), 1)) < tokens.lengths[:, None]
  ids = np.zeros(mask.shape, np.int64)
  ids[mask] = tokens.values
  inputs = {INPUT_IDS: ids, ATTENTION_MASK: mask.astype(np.int64)}
  if features is not None:
    counts = images.lengths[rows]
    inputs[IMAGE_FEATURES] = features[ranges(images.offsets[rows], counts)].astype(np.float32)
    inputs[IMAGE_PLACES] = np.stack([np.repeat(np.arange(len(rows)), counts), images.take(rows).values], axis=1)
  return inputs


def batches(lengths: np.ndarray, cores: int) -> list[np.ndarray]:
  """Returns the items of each batch, longest items first.

  >>> [batch.tolist() for batch in batches(np.array([3, 9, 3, 8]), cores=1)]
  [[1, 3], [0, 2]]

  Args:
    lengths: Number of tokens of each item, int [items].
    cores: Number of batches that run at the same time.
  """
  order = np.argsort(-lengths, kind="stable")
  most = min(_BATCH_TOKENS, max(-(-int(lengths.sum()) // cores), 1))
  found, start = [], 0
  while start < len(order):
    longest = max(int(lengths[order[start]]), 1)
    rows = order[start : start + max(most // longest, 1)]
    padding = np.cumsum(longest - lengths[rows])
    rows = rows[: max(np.searchsorted(padding, _MOST_PADDING, side="right"), 1)]
    found.append(rows)
    start += len(rows)
  return found
