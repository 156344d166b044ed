"""Row of encoding: texts to unit-norm embeddings on the host, tokenizing included."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bench.data import LONGEST, TOKENIZER_PACKAGE, random_texts, temporary_folder, write_bert
from benchmarks.bench.harness import OURS, Check, Cost, Side, Started, Work
from benchmarks.bench.text_models import TextModel
from vixml_jax.encoding.item_encoder import ItemEncoder, encoding_layout
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.input.tokenizer import Tokenizer

# Least cosine to our embeddings, by the dtype of the computation or of the weights.
_LEAST_COSINE = {"float32": 0.999, "bfloat16": 0.99, "int8": 0.9}
_TORCH = ("torch", "transformers", TOKENIZER_PACKAGE)


class Embeddings(NamedTuple):
  """What a side computed.

  Attributes:
    vectors: float32 [texts, D] of unit norm.
    weights: Dtype to which the weights were rounded; "" for that of the row.
  """

  vectors: np.ndarray
  weights: str = ""


def encoding(size: str) -> Work:
  """Texts to embeddings with MiniLM-L6: tokenizing, encoding, pooling."""
  name, count, batch, row_length, chunk_rows, dtype = {
    "tiny": ("tiny-bert", 24, 8, 64, 4, "float32"),
    "cpu": ("minilm-l6", 2048, 64, 64, 32, "float32"),
    "gpu": ("minilm-l6", 16_384, 1024, 128, 256, "bfloat16"),
  }[size]
  model = TextModel.of(name, vocab_size=30522, dtype=dtype)
  texts = random_texts(count, seed=1)
  folder = write_bert(model.encoder, model.params["encoder"])
  layout = encoding_layout(PackedLayout(row_length, chunk_rows), model.mesh)
  tokens = Tokenizer(folder, LONGEST)(texts)
  return Work(
    what=(
      f"{count:,} texts of {tokens.lengths.mean():.1f} tokens on average, at most {LONGEST}, {dtype}; "
      f"{model.encoder['num_layers']} layers of width {model.encoder['embed_dim']}; embeddings are compared by cosine"
    ),
    unit="texts",
    units=count,
    sides=[
      Side(OURS, lambda: _ours(model, layout, folder, texts), (TOKENIZER_PACKAGE,)),
      Side(
        "sentence-transformers, encode",
        lambda: _sentence_transformers(folder, texts, batch, dtype),
        (*_TORCH, "sentence-transformers"),
      ),
      Side("torch, packed, SDPA, compiled", lambda: _packed(model, layout, folder, texts, size != "tiny"), _TORCH),
      Side("ONNX int8 on the CPU", lambda: _onnx(folder, texts, batch), (*_TORCH, "onnx", "onnxscript", "onnxruntime")),
    ],
    check=lambda ours, theirs: _by_cosine(ours, theirs, dtype),
    cost=Cost("flops", model.forward_flops(tokens.lengths), dtype),
  )


def _by_cosine(ours: Embeddings, theirs: Embeddings, dtype: str) -> Check:
  cosines = np.sum(ours.vectors * theirs.vectors, axis=1)
  least = _LEAST_COSINE[theirs.weights or dtype]
  return Check(bool(cosines.min() >= least), f"cosine at least {cosines.min():.5f}, mean {cosines.mean():.5f}")


def _ours(model: TextModel, layout: PackedLayout, folder: Path, texts: list[str]) -> Started:
  tokenizer = Tokenizer(folder, LONGEST)
  encoder = ItemEncoder(model.definition(), layout, model.mesh)

  def embed(_: int) -> Embeddings:
    return Embeddings(encoder.embed(model.params, Items.of_texts(tokenizer(texts))))

  return Started(embed)


def sentence_transformer(folder: Path) -> Any:
  """Returns a `SentenceTransformer` with mean pooling around the encoder in a folder."""
  from sentence_transformers import SentenceTransformer
  from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

  encoder = Transformer(str(folder), max_seq_length=LONGEST)
  return SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())])


def _sentence_transformers(folder: Path, texts: list[str], batch: int, dtype: str) -> Started:
  import torch

  from benchmarks.bench.torch_device import device

  model = sentence_transformer(folder).to(device(), dtype=getattr(torch, dtype)).eval()

  def embed(_: int) -> Embeddings:
    vectors = model.encode(
      texts, batch_size=batch, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
    )
    return Embeddings(vectors.float().cpu().numpy())

  return Started(embed)


def _packed(model: TextModel, layout: PackedLayout, folder: Path, texts: list[str], compiled: bool) -> Started:
  import torch

  from benchmarks.bench.torch_models import PackedEncoder

  tokenizer = Tokenizer(folder, LONGEST)
  encoder = PackedEncoder(model, compiled).eval()
  encoder.encoder.to(getattr(torch, model.encoder["dtype"]))

  def embed(_: int) -> Embeddings:
    packed = pack(Items.of_texts(tokenizer(texts)), layout, round_up=False)
    with torch.inference_mode():
      pooled = encoder.pool_by_chunk(packed, layout.slots)
      return Embeddings(torch.nn.functional.normalize(pooled, dim=1).cpu().numpy())

  return Started(embed)


def _onnx(folder: Path, texts: list[str], batch: int) -> Started:
  """Exports the encoder, stores its matrices in int8, and encodes batches of similar length."""
  import onnxruntime

  tokenizer = Tokenizer(folder, LONGEST)
  options = onnxruntime.SessionOptions()
  # Idle threads sleep, as those of the other sides.
  options.add_session_config_entry("session.intra_op.allow_spinning", "0")
  session = onnxruntime.InferenceSession(_quantized(folder), options, providers=["CPUExecutionProvider"])

  def embed(_: int) -> Embeddings:
    tokens = tokenizer(texts)
    order = np.argsort(-tokens.lengths, kind="stable")
    pooled = np.empty((len(texts), session.get_outputs()[0].shape[2]), np.float32)
    for start in range(0, len(order), batch):
      rows = order[start : start + batch]
      part = tokens.take(rows)
      mask = np.arange(part.lengths.max()) < part.lengths[:, None]
      ids = np.zeros(mask.shape, np.int64)
      ids[mask] = part.values
      (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": mask.astype(np.int64)})
      pooled[rows] = np.einsum("btd,bt->bd", hidden, mask / part.lengths[:, None].astype(np.float32))
    return Embeddings(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), "int8")

  return Started(embed)


def _quantized(folder: Path) -> str:
  """Returns the path of the encoder as an ONNX file with int8 matrices."""
  from onnxruntime.quantization import QuantType, quantize_dynamic
  import torch
  import transformers

  class _Hidden(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
      return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

  path = temporary_folder()
  # Two rows of different lengths, so that the mask is not a constant of the exported program.
  ids, mask = torch.arange(16).reshape(2, 8), torch.ones(2, 8, dtype=torch.long)
  mask[1, 6:] = 0
  rows, places = torch.export.Dim("rows", min=1, max=65_536), torch.export.Dim("places", min=2, max=LONGEST)
  torch.onnx.export(
    _Hidden().eval(),
    (ids, mask),
    path / "encoder.onnx",
    input_names=["input_ids", "attention_mask"],
    output_names=["hidden"],
    dynamic_shapes={"input_ids": {0: rows, 1: places}, "attention_mask": {0: rows, 1: places}},
    dynamo=True,
    verbose=False,
  )
  quantize_dynamic(path / "encoder.onnx", path / "int8.onnx", weight_type=QuantType.QInt8)
  return str(path / "int8.onnx")
