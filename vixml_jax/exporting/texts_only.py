"""Checks whether a folder that encodes texts, without images or with them, can stand for a model."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from vixml_jax.errors import InputError

_log = logging.getLogger(__name__)


def check_encodes_texts(workdir: Path, config: ConfigDict, library: str) -> None:
  """Checks that texts alone have embeddings, and warns if items of the model may have images as well.

  Args:
    workdir: Folder of the run.
    config: Its config.
    library: Name of the library that reads the folder, for messages.

  Raises:
    InputError: The model computes embeddings after the pooling, or its items have no text.
  """
  if config.images and config.fusion.method == "late":
    raise InputError(
      f"{workdir}: a layer after the pooling computes the embeddings of this model (fusion.method=late), "
      f"which a folder for {library} cannot contain; use --format=hf for the encoder alone"
    )
  check_has_text(workdir, config, library)
  if config.images:
    _log.warning(
      "the folder encodes texts only: queries without images get the embeddings of vixml_jax.load, queries with images "
      "do not"
    )


def check_has_text(workdir: Path, config: ConfigDict, library: str) -> None:
  """Checks that the items of a model have a text, which the tokenizer of an exported folder turns into an item.

  Args:
    workdir: As for `check_encodes_texts`.
    config: As for `check_encodes_texts`.
    library: As for `check_encodes_texts`.

  Raises:
    InputError: The items have no text.
  """
  if "E" not in config.prompt.template.split():
    raise InputError(
      f"{workdir}: its items have no text (prompt.template={config.prompt.template!r} lacks E), but a folder for "
      f"{library} needs one; use --format=hf for the encoder alone"
    )
