"""Writes a trained encoder, or its label embeddings, in the format of another library."""

from collections.abc import Mapping
import json
import logging
from pathlib import Path
import shutil
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax import sharding
from vixml_jax.array_file import ArrayFile
from vixml_jax.errors import InputError
from vixml_jax.exporting.item_tokenizer import max_item_length, save_item_tokenizer
from vixml_jax.exporting.onnx_folder import ONNX_DTYPES, write_onnx_folder
from vixml_jax.exporting.texts_only import check_encodes_texts
from vixml_jax.files import new_folder
from vixml_jax.inference.onnx_conversion import check_convertible
from vixml_jax.inference.trained_encoder import TrainedEncoder, load_trained_encoder
from vixml_jax.input.packing import without_images
from vixml_jax.models.lora import lora_scale, merge_lora
from vixml_jax.models.parameters import join_params
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import checkpoint_id, newest_checkpoint
from vixml_jax.run.workdir import CHECKPOINTS, CONFIG, INDEX, TOKENIZER
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.typing import Tree
from vixml_jax.weights import hf_config, peft, source
from vixml_jax.weights.hf_folder import save_pretrained
from vixml_jax.weights.tables import TABLES

_log = logging.getLogger(__name__)

_LABELS_AT_ONCE = 8192
_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
_TRANSFORMERS_CLASSES = {
  "bert": "BertModel",
  "distilbert": "DistilBertModel",
  "qwen2": "Qwen2Model",
  "qwen3": "Qwen3Model",
  "llama": "LlamaModel",
}


def export(workdir: Path, kind: str, output: Path, dtype: str = "float32", max_shard_bytes: int = 5 * 10**9) -> None:
  """Writes a new folder, whole or not at all. No training data are needed.

  Args:
    workdir: Folder that training, or `vixml_jax.evaluate`, wrote.
    kind: One of `formats.FORMATS`. "hf" is the encoder with merged adapters, for `transformers.AutoModel`. "peft" is
      the adapters alone. "sentence-transformers" is the encoder with tokenizer, pooling and normalization, which gives
      texts the same embeddings as here. "onnx" is the same as a file that ONNX Runtime runs. "embeddings" is the label
      prototypes.
    output: Folder to create.
    dtype: Type of the weights of "hf", "sentence-transformers" (not int8) and "onnx" (float32 or int8).
    max_shard_bytes: Maximum size of one of their files of weights.

  Raises:
    InputError: The folder exists and is not empty, a file of the workdir is missing or damaged, or the format cannot
      represent the model.
  """
  _check_dtype(kind, dtype)
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(f"{output}: exists already; use a new folder as --output, or delete it")
  try:
    with new_folder(output) as folder:
      if kind == "embeddings":
        export_embeddings(workdir, folder)
      elif kind == "peft":
        _export_peft(workdir, folder)
      elif kind == "onnx":
        _export_onnx(workdir, folder, dtype)
      else:
        write = _export_hf if kind == "hf" else _export_sentence_transformers
        write(workdir, folder, dtype, max_shard_bytes)
  except OSError as error:
    raise InputError(f"{output}: cannot be written ({error}); use another --output") from error


def _check_dtype(kind: str, dtype: str) -> None:
  """Raises an InputError if a format has no weights of this type."""
  if kind == "onnx" and dtype not in ONNX_DTYPES:
    raise InputError(f"--dtype={dtype}: --format=onnx has {' and '.join(ONNX_DTYPES)}; use one of them")
  if kind != "onnx" and dtype == "int8":
    raise InputError(f"--dtype={dtype}: only --format=onnx has it; use another type for --format={kind}")


def _export_onnx(workdir: Path, folder: Path, dtype: str) -> None:
  config = configuration.read(workdir / CONFIG)
  check_encodes_texts(workdir, config, "ONNX Runtime")
  check_convertible(workdir, config)
  write_onnx_folder(_load(workdir), folder, dtype)


def _export_hf(workdir: Path, folder: Path, dtype: str, max_shard_bytes: int) -> None:
  encoder = _load(workdir)
  _write_model(encoder, folder, dtype, max_shard_bytes)
  _copy_tokenizer(workdir, folder)
  pooling, template = encoder.config.encoder.pooling, encoder.config.prompt.template
  _log.info(
    "the folder has the encoder alone: an embedding is the %s of its hidden states over an item's tokens "
    "(prompt.template %r), at unit norm",
    "last" if pooling == "last" else "mean",
    template,
  )


def _export_peft(workdir: Path, folder: Path) -> None:
  """Writes adapters as they were trained, in float32 and in one file, since they are small."""
  config = configuration.read(workdir / CONFIG).encoder
  if not config.get("lora_rank"):
    raise InputError(
      f"{workdir}: has no adapters, because the run trained the whole encoder (encoder.lora_rank=0); use --format=hf"
    )
  if config.random_init:
    raise InputError(
      f"{workdir}: its adapters belong to a random base (encoder.random_init), which is not published; use --format=hf"
    )
  encoder = _load(workdir)
  base, revision = base_name(config.pretrained)
  peft.save_adapter(encoder.params["encoder"], folder, base, config.lora_alpha, revision)
  _copy_tokenizer(workdir, folder)
  if config.base_dtype:
    _log.warning(
      "these adapters were trained with a base in %s (encoder.base_dtype); on the published base, embeddings differ by "
      "rounding: --format=hf has the rounded base with the adapters merged",
      config.base_dtype,
    )
  if config.bidirectional:
    _log.warning(
      "these adapters are for a base with bidirectional attention: load it with "
      "AutoModel.from_pretrained(%r, is_causal=False)",
      base,
    )


def base_name(pretrained: str) -> tuple[str, str | None]:
  """Returns the absolute folder of a pretrained encoder, or its name and its revision on the hub, as PEFT expects."""
  if pretrained.startswith("package:") or Path(pretrained).expanduser().is_dir():
    return str(source.resolve(pretrained, weights=False, tokenizer=False).absolute()), None
  name, _, revision = pretrained.partition("@")
  return name, revision or None


def _export_sentence_transformers(workdir: Path, folder: Path, dtype: str, max_shard_bytes: int) -> None:
  config = configuration.read(workdir / CONFIG)
  check_encodes_texts(workdir, config, "sentence-transformers")
  encoder = _load(workdir)
  _write_model(encoder, folder, dtype, max_shard_bytes)
  template, max_length = without_images(encoder.layout.template), config.dataset.max_length
  save_item_tokenizer(workdir / TOKENIZER, template, max_length, folder)
  _write_modules(folder, encoder.definition.embed_dim, config, max_item_length(template, max_length))


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
      "pooling_mode_cls_token": False,
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


def export_embeddings(workdir: Path, folder: Path, labels_at_once: int = _LABELS_AT_ONCE) -> None:
  """Writes the prototypes of the labels that are not deleted.

  The files are `labels.npy`, float32 [live labels, D], and `labels.parquet` with id, uid, text and embedding in the
  same order.

  Args:
    workdir: As for `export`.
    folder: Folder to write the files to.
    labels_at_once: Number of labels that are written at a time.
  """
  step, _ = newest_checkpoint(workdir / CHECKPOINTS)
  checkpoint = checkpoint_id(workdir / CHECKPOINTS, step)
  index = LabelIndex.open(workdir / INDEX, checkpoint=checkpoint, search="exact")  # Nothing is built before a search.
  ids = np.flatnonzero(~index.deleted)
  names = pa.schema([("id", pa.int32()), ("uid", pa.string()), ("text", pa.string())])
  schema = names.append(pa.field("embedding", pa.list_(pa.float32(), index.dim)))
  with (
    ArrayFile(folder / "labels.npy", np.float32, (index.dim,)) as array,
    pq.ParquetWriter(folder / "labels.parquet", schema) as table,
  ):
    for start in range(0, len(ids), labels_at_once):
      block = ids[start : start + labels_at_once]
      embeddings = np.ascontiguousarray(index.embeddings[block], np.float32)
      array.append(embeddings)
      table.write_batch(
        pa.record_batch(
          [
            pa.array(block, pa.int32()),
            pa.array(index.uids(block)),
            pa.array(index.texts(block)),
            pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), index.dim),
          ],
          schema=schema,
        )
      )


def _load(workdir: Path) -> TrainedEncoder:
  """Loads the encoder into the memory of this host, which must hold it to write it."""
  return load_trained_encoder(workdir, sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1]))


def _copy_tokenizer(workdir: Path, folder: Path) -> None:
  for path in (workdir / TOKENIZER).iterdir():
    if path.name != "config.json":  # That of the model is written.
      shutil.copyfile(path, folder / path.name)


def _write_model(encoder: TrainedEncoder, folder: Path, dtype: str, max_shard_bytes: int) -> None:
  """Writes config.json and weights."""
  config = _model_config(encoder, dtype)
  save_pretrained(
    _merged(encoder), folder, config, TABLES[config["model_type"]], dtype=dtype, max_shard_bytes=max_shard_bytes
  )


def _model_config(encoder: TrainedEncoder, dtype: str) -> dict[str, Any]:
  """Returns the pretrained encoder's config.json if it agrees with the run's config, else one made from the latter."""
  arguments = encoder.definition.arguments["encoder"]
  config = hf_config.config_of(arguments)
  changed: dict[str, Any] = {"architectures": [_TRANSFORMERS_CLASSES[config["model_type"]]], "dtype": dtype}
  if arguments.get("bidirectional"):
    changed["is_causal"] = False
    _log.warning(
      "attention of this model is bidirectional: config.json has is_causal=false, which transformers reads from "
      "version 5.2 on"
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


def _merged(encoder: TrainedEncoder) -> Tree:
  """Returns the encoder's parameters. Adapters are added to a kernel when it is read.

  They are added to the kernels that they were trained with: those of a quantized base are dequantized, and not read
  from the original weights again, from which they differ by rounding.
  """
  params = join_params(encoder.params, encoder.frozen)["encoder"]
  arguments = encoder.definition.arguments["encoder"]
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
