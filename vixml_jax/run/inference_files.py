"""Files of a workdir that inference needs besides the checkpoint: tokenizer, origin of image features, label index."""

import itertools
import logging
import os
from pathlib import Path
import shutil
from typing import Any

import jax
import tensorflow_datasets as tfds

from vixml_jax import sharding
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.files import new_folder, read_json_object, sha256_of_file, sync_folder, write_json
from vixml_jax.images.feature_set import open_features
from vixml_jax.run.checkpoint import checkpoint_id
from vixml_jax.run.workdir import CHECKPOINTS, INDEX, INFERENCE_INFO, TOKENIZER
from vixml_jax.search.label_index_files import IndexContents, is_edited, write_index
from vixml_jax.search.text_table import TextTable, shown_text

_log = logging.getLogger(__name__)

# The files of a pretrained folder that determine token ids, and the config that says whose tokenizer it is.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "config.json",
)
_ORIGIN_KEYS = ("checkpoint", "checkpoint_sha256", "variant", "preprocessing", "dtype", "dim")


def write_inference_files(
  workdir: Path,
  step: int,
  contents: IndexContents,
  *,
  tokenizer_folder: Path,
  image_features: dict[str, Any] | None,
  search: str,
  scann_recall: float,
  retrieval: dict[str, Any] | None,
) -> None:
  """Writes `tokenizer/`, `inference.json` and `index/`.

  An index of the same checkpoint to which labels were added, or from which labels were deleted, is kept as it is.

  Args:
    workdir: folder of the run; one process writes it.
    step: step of the checkpoint that contains the model.
    contents: contents of the label index.
    tokenizer_folder: folder of the pretrained encoder.
    image_features: origin of the image features (`image_origin`); None for a model of texts only.
    search: "exact" or "scann".
    scann_recall: share of the 100 best labels that ScaNN must find; 0 takes its settings of search by rules of thumb.
    retrieval: lambda, temperature and hits of retrieval-augmented inference; None where it is not used.
  """
  checkpoint = checkpoint_id(workdir / CHECKPOINTS, step)
  tokenizer_hashes = _copy_tokenizer(tokenizer_folder, workdir / TOKENIZER)
  write_json(workdir / INFERENCE_INFO, {"tokenizer_sha256": tokenizer_hashes, "image_features": image_features})
  if _was_edited(workdir / INDEX, checkpoint):
    _log.warning(
      "%s: labels were added to it or deleted from it, so it is kept; delete the folder to have it written again",
      workdir / INDEX,
    )
    return
  # One process runs this, so recall is measured on its own devices.
  mesh = sharding.make_mesh(devices=jax.local_devices())
  write_index(
    workdir / INDEX,
    contents,
    checkpoint=checkpoint,
    search=search,
    scann_recall=scann_recall,
    retrieval=retrieval,
    mesh=mesh,
  )


def _was_edited(folder: Path, checkpoint: dict[str, Any]) -> bool:
  """Returns whether the index was edited; a damaged one, which may have been edited, is moved to a free name."""
  try:
    return is_edited(folder, checkpoint)
  except InputError as error:
    names = (folder.with_name(f"{folder.name}.damaged-{number}") for number in itertools.count(1))
    kept = next(path for path in names if not path.exists())
    folder.rename(kept)
    sync_folder(folder.parent)
    _log.warning("%s; it is kept as %s, and a new index is written", str(error).partition(";")[0], kept)
    return False


def read_inference_info(workdir: Path, step: int) -> dict[str, Any]:
  """Returns `tokenizer_sha256` and `image_features` of `inference.json`.

  Args:
    workdir: folder of the run.
    step: step of its newest checkpoint, for the error message.

  Raises:
    InputError: the file is missing or damaged.
  """
  path = workdir / INFERENCE_INFO
  again = f"run python -m vixml_jax.evaluate --workdir={workdir} to write it again"
  if not path.exists():
    raise InputError(
      f"{workdir}: has a checkpoint of step {step}, but no {INFERENCE_INFO}, tokenizer or index to answer queries "
      f"with; where its data set is, run python -m vixml_jax.evaluate --workdir={workdir}"
    )
  info = read_json_object(path, absent=again, damaged=again)
  missing = [key for key in ("tokenizer_sha256", "image_features") if key not in info]
  if missing:
    raise InputError(f"{path}: damaged (it lacks {missing[0]!r}); {again}")
  return info


def image_origin(builder: tfds.core.DatasetBuilder, data_dir: str | os.PathLike[str], name: str) -> dict[str, Any]:
  """Returns how the image features of a data set were made: images in queries need the same tower and preprocessing.

  Args:
    builder: the prepared data set.
    data_dir: folder of all prepared data.
    name: name of the features.
  """
  metadata = open_features(builder, data_dir, name).metadata
  origin = {key: metadata[key] for key in _ORIGIN_KEYS if key in metadata}
  checkpoint = origin.get("checkpoint")
  if checkpoint and Path(checkpoint).exists():  # A relative path is only valid in the folder of this process.
    origin["checkpoint"] = str(Path(checkpoint).absolute())
  return origin


def query_texts(builder: tfds.core.DatasetBuilder, text_fields: tuple[str, ...]) -> TextTable:
  """Returns the texts of all training queries of a data set, as far as an index keeps them."""
  batches = Records(builder, "train").batches()
  return TextTable.from_blocks([shown_text(record.text(text_fields)) for record in batch] for batch in batches)


def label_names(builder: tfds.core.DatasetBuilder, text_fields: tuple[str, ...]) -> tuple[TextTable, TextTable]:
  """Returns texts and uids of all labels of a data set."""

  def table(fields: tuple[str, ...]) -> TextTable:
    batches = Records(builder, "labels").batches()
    return TextTable.from_blocks([record.text(fields) for record in batch] for batch in batches)

  return table(text_fields), table(("uid",))


def _copy_tokenizer(pretrained: Path, target: Path) -> dict[str, str]:
  """Copies the tokenizer's files and returns their sha256 by name."""
  names = [name for name in _TOKENIZER_FILES if (pretrained / name).is_file()]
  hashes = {name: sha256_of_file(pretrained / name) for name in names}
  if not target.is_dir() or hashes != {path.name: sha256_of_file(path) for path in target.iterdir()}:
    shutil.rmtree(target, ignore_errors=True)
    with new_folder(target) as work:
      for name in names:
        shutil.copyfile(pretrained / name, work / name)
  return hashes
