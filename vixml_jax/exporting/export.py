"""Writes a trained encoder, or its label embeddings, as other libraries read them."""

from collections.abc import Mapping
import json
import logging
import os
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
from vixml_jax.files import new_folder
from vixml_jax.inference.trained_encoder import TrainedEncoder, load_trained_encoder
from vixml_jax.input.packing import without_images
from vixml_jax.models import layers
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import checkpoint_id, newest_checkpoint
from vixml_jax.run.workdir import CHECKPOINTS, INDEX, TOKENIZER
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.typing import Tree
from vixml_jax.weights import hf_config, peft, source
from vixml_jax.weights.hf_folder import save_pretrained
from vixml_jax.weights.tables import TABLES

_log = logging.getLogger(__name__)

FORMATS = ("hf", "peft", "sentence-transformers", "embeddings")
_BLOCK = 8192  # Labels written at a time.
_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
_TRANSFORMERS_CLASSES = {
  "bert": "BertModel",
  "distilbert": "DistilBertModel",
  "qwen2": "Qwen2Model",
  "qwen3": "Qwen3Model",
  "llama": "LlamaModel",
}


def export(workdir: Path, kind: str, output: Path, dtype: str = "float32", max_shard_bytes: int = 5 * 10**9) -> None:
  """Writes a new folder, whole or not at all; no training data are needed.

  Args:
    workdir: what training, or `vixml_jax.evaluate`, wrote.
    kind: one of `FORMATS`. "hf": the encoder, adapters merged, for `transformers.AutoModel`. "peft": the adapters
      alone. "sentence-transformers": the encoder with tokenizer, pooling and norm: texts to embeddings as they are
      here. "embeddings": the label prototypes.
    output: the folder to make.
    dtype: of the weights of "hf" and "sentence-transformers".
    max_shard_bytes: most bytes in one file of theirs.

  Raises:
    InputError: the folder exists and is not empty, something of the workdir is missing or damaged, or the format
      cannot say what the model does.
  """
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(f"{output}: exists already; name a new folder as --output, or delete it")
  try:
    with new_folder(output) as folder:
      if kind == "embeddings":
        _export_embeddings(workdir, folder)
      elif kind == "peft":
        _export_peft(workdir, folder)
      else:
        write = _export_hf if kind == "hf" else _export_sentence_transformers
        write(workdir, folder, dtype, max_shard_bytes)
  except OSError as error:
    raise InputError(f"{output}: cannot be written ({error}); name another --output") from error


def _export_hf(workdir: Path, folder: Path, dtype: str, max_shard_bytes: int) -> None:
  encoder = _load(workdir)
  _write_model(encoder, folder, dtype, max_shard_bytes)
  _copy_tokenizer(workdir, folder)
  pooling, template = encoder.config.encoder.pooling, encoder.config.prompt.template
  _log.info(
    "the encoder alone: an embedding is the unit-norm %s of its hidden states over an item's tokens "
    "(prompt.template %r)",
    "last" if pooling == "last" else "mean",
    template,
  )


def _export_peft(workdir: Path, folder: Path) -> None:
  """Adapters are small: f32 as they were trained, in one file."""
  wanted = configuration.read(workdir / "config.json").encoder
  if not wanted.get("lora_rank"):
    raise InputError(
      f"{workdir}: this run trained its whole encoder, without adapters (encoder.lora_rank=0); use --format=hf"
    )
  if wanted.random_init:
    raise InputError(
      f"{workdir}: its adapters belong to a base that was drawn at random (encoder.random_init), which "
      "no one else has; use --format=hf"
    )
  encoder = _load(workdir)
  base, revision = _base_name(wanted.pretrained)
  peft.save_adapter(encoder.params["encoder"], folder, base, wanted.lora_alpha, revision)
  _copy_tokenizer(workdir, folder)
  if wanted.bidirectional:
    _log.warning(
      "these adapters are for a base that sees both ways: load it with is_causal=False, as in "
      "AutoModel.from_pretrained(%r, is_causal=False)",
      base,
    )


def _base_name(pretrained: str) -> tuple[str, str | None]:
  """The base's folder, or its name on the hub and its revision."""
  if pretrained.startswith("package:") or os.path.isdir(os.path.expanduser(pretrained)):
    return str(source.resolve(pretrained).absolute()), None
  name, _, revision = pretrained.partition("@")
  return name, revision or None


def _export_sentence_transformers(workdir: Path, folder: Path, dtype: str, max_shard_bytes: int) -> None:
  config = configuration.read(workdir / "config.json")
  if config.images and config.fusion.method == "late":
    raise InputError(
      f"{workdir}: a layer after the pooling makes the embeddings of this model (fusion.method=late), "
      "which sentence-transformers has no module for; use --format=hf for the encoder alone"
    )
  if "E" not in config.prompt.template.split():
    raise InputError(
      f"{workdir}: its items have no text (prompt.template={config.prompt.template!r} lacks E), and "
      "sentence-transformers would encode nothing else"
    )
  if config.images:
    _log.warning(
      "texts only: a query with pictures gets another embedding from vixml_jax.load than it gets from this "
      "folder, one without pictures the same"
    )
  encoder = _load(workdir)
  _write_model(encoder, folder, dtype, max_shard_bytes)
  template, max_length = without_images(encoder.layout.template), config.dataset.max_length
  save_item_tokenizer(workdir / TOKENIZER, template, max_length, folder)
  _write_modules(folder, encoder.definition.embed_dim, config, max_item_length(template, max_length))


def _write_modules(folder: Path, embed_dim: int, config: ConfigDict, max_seq_length: int) -> None:
  """What makes a folder of transformers one of sentence-transformers; in the names that all its versions read."""
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


def _export_embeddings(workdir: Path, folder: Path) -> None:
  """`labels.npy`, float32 [live labels, D], and `labels.parquet` with id, uid, text and embedding in the same order."""
  step, _ = newest_checkpoint(workdir / CHECKPOINTS)
  checkpoint = checkpoint_id(workdir / CHECKPOINTS, step)
  index = LabelIndex.open(workdir / INDEX, checkpoint=checkpoint, search="exact")  # Nothing is built until it searches.
  ids = np.flatnonzero(~index.deleted)
  names = pa.schema([("id", pa.int32()), ("uid", pa.string()), ("text", pa.string())])
  schema = names.append(pa.field("embedding", pa.list_(pa.float32(), index.dim)))
  with (
    ArrayFile(folder / "labels.npy", np.float32, (index.dim,)) as array,
    pq.ParquetWriter(folder / "labels.parquet", schema) as table,
  ):
    for start in range(0, len(ids), _BLOCK):
      block = ids[start : start + _BLOCK]
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
  """The encoder in this host's memory, where the largest fits that could be written from here."""
  return load_trained_encoder(workdir, sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1]))


def _copy_tokenizer(workdir: Path, folder: Path) -> None:
  for path in (workdir / TOKENIZER).iterdir():
    if path.name != "config.json":  # That is the model's.
      shutil.copyfile(path, folder / path.name)


def _write_model(encoder: TrainedEncoder, folder: Path, dtype: str, max_shard_bytes: int) -> None:
  """config.json and weights."""
  config = _model_config(encoder, dtype)
  save_pretrained(
    _merged(encoder), folder, config, TABLES[config["model_type"]], dtype=dtype, max_shard_bytes=max_shard_bytes
  )


def _model_config(encoder: TrainedEncoder, dtype: str) -> dict[str, Any]:
  """The config.json of the pretrained encoder where it says the same as the run's config, else one made from that."""
  arguments = encoder.definition.arguments["encoder"]
  config = hf_config.config_of(arguments)
  changed: dict[str, Any] = {"architectures": [_TRANSFORMERS_CLASSES[config["model_type"]]], "dtype": dtype}
  if arguments.get("bidirectional"):
    changed["is_causal"] = False
    _log.warning(
      "attention of this model goes both ways: config.json says so with is_causal=false, which transformers "
      "knows from 5.2 on"
    )
  folder = encoder.workdir / TOKENIZER
  try:
    original = hf_config.read_config(folder)
    hf_config.check_arguments(folder, arguments)
  except InputError:  # There is none, or it came with a tokenizer that was taken from another model.
    return config | changed
  # A path of another machine, and code or a dtype of the file that these weights came from.
  dropped = ("_name_or_path", "auto_map", "torch_dtype")
  kept = {key: value for key, value in original.items() if key not in dropped}
  return (kept if original["model_type"] == config["model_type"] else config) | changed


def _merged(encoder: TrainedEncoder) -> Tree:
  """The encoder's parameters; adapters are added to their kernels when these are read."""
  params = layers.join_params(encoder.params, encoder.frozen)["encoder"]
  arguments = encoder.definition.arguments["encoder"]
  if not arguments.get("lora_rank"):
    return params
  return _merge(params, layers.lora_scale(arguments["lora_rank"], arguments["lora_alpha"]))


def _merge(params: Mapping[str, Any], scale: float) -> Tree:
  merged = {name: _merge(value, scale) if isinstance(value, dict) else value for name, value in params.items()}
  if "lora_a" in merged:
    merged["kernel"] = _MergedKernel(merged["kernel"], merged.pop("lora_a"), merged.pop("lora_b"), scale)
  return merged


class _MergedKernel:
  """A kernel plus its adapter in f32, one layer at a time: a large base does not fit the host twice."""

  def __init__(self, kernel: Any, lora_a: Any, lora_b: Any, scale: float):
    self._kernel, self._lora_a, self._lora_b, self._scale = kernel, lora_a, lora_b, scale
    self.shape = kernel.shape

  def __getitem__(self, index: Any) -> np.ndarray:
    matrices = {
      "kernel": self._kernel[index].astype(np.float32),
      "lora_a": self._lora_a[index],
      "lora_b": self._lora_b[index],
    }
    return np.asarray(layers.merge_lora(matrices, self._scale)["kernel"])
