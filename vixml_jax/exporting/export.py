"""Writes a trained encoder, or the vectors of its labels, in the format of another library."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.exporting.formats import DTYPES_OF, FORMATS
from vixml_jax.exporting.label_vectors import write_label_vectors
from vixml_jax.exporting.model_card import write_model_card
from vixml_jax.exporting.onnx_folder import write_onnx_folder
from vixml_jax.exporting.peft_folder import check_has_adapters, write_peft_folder
from vixml_jax.exporting.sentence_transformers_folder import write_sentence_transformers_folder
from vixml_jax.exporting.texts_only import check_encodes_texts, check_has_text
from vixml_jax.exporting.transformers_folder import write_transformers_folder
from vixml_jax.files import new_folder
from vixml_jax.inference.onnx_conversion import check_convertible
from vixml_jax.inference.trained_encoder import load_trained_encoder
from vixml_jax.run import configuration
from vixml_jax.run.workdir import CONFIG
from vixml_jax.search.vector_form import VectorForm


def export(
  workdir: Path,
  kind: str,
  output: Path,
  dtype: str = "float32",
  max_shard_bytes: int = 5 * 10**9,
  image_checkpoint: str | None = None,
  dims: int | None = None,
) -> None:
  """Writes a new folder with a model card, README.md, whole or not at all. No training data are needed.

  Args:
    workdir: Folder that training, or `vixml_jax.evaluate`, wrote.
    kind: One of `formats.FORMATS`. "hf" is the encoder with merged adapters, for `transformers.AutoModel`. "peft" is
      the adapters alone. "sentence-transformers" is the encoder with tokenizer, pooling and normalization, which gives
      texts the same embeddings as here. "onnx" is the same as a file that ONNX Runtime runs; it takes images as well.
      "label-vectors" is the label prototypes, for other search systems.
    output: Folder to create.
    dtype: Type of the weights or of the vectors; "peft" has float32 only, "onnx" float32 and int8, "label-vectors"
      float32 and float16, the others all but int8.
    max_shard_bytes: Maximum size of one file of weights of "hf" and "sentence-transformers".
    image_checkpoint: The tower that made the run's image features, for "onnx"; None for the recorded one.
    dims: Number of first dimensions of the vectors, for "label-vectors"; None for all.

  Raises:
    InputError: The format is unknown or lacks the type, the folder exists and is not empty, a file of the workdir is
      missing or damaged, or the format cannot represent the model.
  """
  _check_format(kind, dtype)
  if image_checkpoint is not None and kind != "onnx":
    raise InputError(f"--image_checkpoint: --format={kind} has no image tower; leave it out, or use --format=onnx")
  if dims is not None and kind != "label-vectors":
    raise InputError(f"--dims={dims}: only --format=label-vectors has it; leave it out")
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(f"{output}: exists already; use a new folder as --output, or delete it")
  config = configuration.read(workdir / CONFIG)
  VectorForm(dims=dims).check(config.encoder.embed_dim, "exact")
  _check_model(workdir, kind, config)
  try:
    with new_folder(output) as folder:
      usage = _write(workdir, kind, folder, dtype, max_shard_bytes, image_checkpoint, dims)
      card = write_model_card(workdir, config, kind, folder, usage)
      _share_permissions(folder, card)
  except OSError as error:
    raise InputError(f"{output}: cannot be written ({error}); use another --output") from error


def _check_format(kind: str, dtype: str) -> None:
  """Raises an InputError if there is no such format, or it has no numbers of this type."""
  if kind not in FORMATS:
    raise InputError(f"--format={kind}: is unknown; use one of {', '.join(FORMATS)}")
  dtypes = DTYPES_OF[kind]
  if dtype not in dtypes:
    advice = "use one of them" if len(dtypes) > 1 else "use it"
    raise InputError(f"--dtype={dtype}: --format={kind} has {' and '.join(dtypes)}; {advice}")


def _check_model(workdir: Path, kind: str, config: ConfigDict) -> None:
  """Raises an InputError if a format cannot represent the model; nothing is loaded."""
  if kind == "peft":
    check_has_adapters(workdir, config)
  elif kind == "sentence-transformers":
    check_encodes_texts(workdir, config, "sentence-transformers")
  elif kind == "onnx":
    check_has_text(workdir, config, "ONNX Runtime")
    check_convertible(workdir, config)


def _write(
  workdir: Path,
  kind: str,
  folder: Path,
  dtype: str,
  max_shard_bytes: int,
  image_checkpoint: str | None,
  dims: int | None,
) -> dict[str, Any]:
  """Writes all files but the model card, and returns what that needs to know."""
  if kind == "label-vectors":
    return write_label_vectors(workdir, folder, dtype, dims)
  # This host must hold the encoder to write it.
  encoder = load_trained_encoder(workdir, sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1]))
  if kind == "peft":
    return write_peft_folder(encoder, folder)
  if kind == "onnx":
    return write_onnx_folder(encoder, folder, dtype, image_checkpoint)
  write = write_transformers_folder if kind == "hf" else write_sentence_transformers_folder
  return write(encoder, folder, dtype, max_shard_bytes)


def _share_permissions(folder: Path, like: Path) -> None:
  """Gives all files the permissions of `like`, which was made with those of this process.

  safetensors makes files that only their owner can read, whatever the umask.
  """
  mode = like.stat().st_mode
  for path in folder.rglob("*"):
    if path.is_file():
      path.chmod(mode)
