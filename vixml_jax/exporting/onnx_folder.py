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
ONNX_DTYPES = tuple(_MODELS)
_INFO = "onnx.json"
_README = """# A text encoder as an ONNX model

`{model}` maps texts to embeddings of {dim} numbers at unit norm. It runs in any program that reads ONNX
models, such as ONNX Runtime:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_length})
tokenizer.enable_padding()
session = onnxruntime.InferenceSession("{model}", providers=["CPUExecutionProvider"])

rows = tokenizer.encode_batch(["arrow up", "cloud"])
(embeddings,) = session.run(
  ["{embeddings}"],
  {{
    "{ids}": np.array([row.ids for row in rows]),
    "{mask}": np.array([row.attention_mask for row in rows]),
  }},
)
print(embeddings @ embeddings.T)  # Cosines.
```

| input or output | type |
|---|---|
| `{ids}` | int64 [batch, length], padded on the right with any token |
| `{mask}` | int64 [batch, length], 1 for tokens and 0 for padding |
| `{embeddings}` | float32 [batch, {dim}], at unit norm |
| `{pooled}` | float32 [batch, {dim}], the mean over the tokens, before it is scaled to unit norm |

A text is that of an item of the training data: {fields}, joined by a space. The tokenizer adds all other tokens of an
item. Batches of texts of similar length need little padding. `{info}` has the sha256 of the model.
{int8}"""
_INT8 = """
The weights of the layers are in int8, with {bits} bits. Activations are rounded to 8 bits, by the range that they have
in a batch: the embedding of a text depends slightly on the other texts of its batch.
"""
_BITS = """A model with 8 bits is for CPUs with VNNI, and for ARM. On other CPUs, export it there: it then has 7 bits.
"""
_COSINE = """
On {texts} texts of labels, the cosine to the embeddings in float32 is {mean:.5f} on average and at least {least:.5f}.
"""


def write_onnx_folder(encoder: TrainedEncoder, folder: Path, dtype: str) -> None:
  """Writes `model.onnx` or `model_int8.onnx`, the tokenizer, `onnx.json` and README.md.

  The model gives texts the embeddings of evaluation, like the format "sentence-transformers". It does not take images.

  Args:
    encoder: The encoder; see `texts_only.check_encodes_texts`.
    folder: Folder to write the files to.
    dtype: One of `ONNX_DTYPES`.

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
  (folder / "README.md").write_text(_readme(info, list(config.text_fields)), encoding="utf-8")


def _readme(info: dict[str, Any], fields: list[str]) -> str:
  cosine, bits, int8 = info["cosine_to_float32"], info["weight_bits"], ""
  if info["model"] == _MODELS["int8"]:
    int8 = _INT8.format(bits=bits) + (_BITS if bits == 8 else "") + ("" if cosine is None else _COSINE.format(**cosine))
  return _README.format(
    **{key: info[key] for key in ("model", "dim", "max_length")},
    embeddings=EMBEDDINGS,
    pooled=POOLED,
    ids=INPUT_IDS,
    mask=ATTENTION_MASK,
    fields=", ".join(f"`{field}`" for field in fields),
    info=_INFO,
    int8=int8,
  )
