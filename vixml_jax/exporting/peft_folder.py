"""Writes a folder with the adapters of an encoder in the format of PEFT."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError
from vixml_jax.exporting.transformers_folder import copy_tokenizer
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.run.workdir import TOKENIZER
from vixml_jax.weights import hf_config, peft, source

_log = logging.getLogger(__name__)


def check_has_adapters(workdir: Path, config: ConfigDict) -> None:
  """Checks that a run trained adapters, of a base that others can load.

  Raises:
    InputError: The run trained the whole encoder, or its base is random, or attention of the base cannot be changed.
  """
  if not config.encoder.get("lora_rank"):
    raise InputError(
      f"{workdir}: has no adapters, because the run trained the whole encoder (encoder.lora_rank=0); use --format=hf"
    )
  if config.encoder.random_init:
    raise InputError(
      f"{workdir}: its adapters belong to a random base (encoder.random_init), which is not published; use --format=hf"
    )
  if config.encoder.bidirectional and hf_config.text_part(workdir / TOKENIZER):
    raise InputError(
      f"{workdir}: attention is bidirectional (encoder.bidirectional), which no option of transformers makes it in a "
      "base with an image tower; use --format=hf"
    )


def write_peft_folder(encoder: TrainedEncoder, folder: Path) -> dict[str, Any]:
  """Writes adapters as they were trained, in float32 and in one file, since they are small.

  Returns:
    What the model card needs to know: `base`, and the `options` with which it is loaded for bidirectional attention.
  """
  config = encoder.config.encoder
  base, revision = source.peft_base(config.pretrained)
  part = hf_config.text_part(encoder.workdir / TOKENIZER)
  peft.save_adapter(encoder.params["encoder"], folder, base, config.lora_alpha, revision, part)
  copy_tokenizer(encoder.workdir, folder)
  if config.base_dtype:
    _log.warning(
      "these adapters were trained with a base in %s (encoder.base_dtype); on the published base, embeddings differ by "
      "rounding: --format=hf has the rounded base with the adapters merged",
      config.base_dtype,
    )
  options = ""
  if config.bidirectional:
    found = hf_config.bidirectional_options(encoder.definition.arguments["encoder"])
    options = "".join(f", {key}={value}" for key, value in found.items())
    _log.warning(
      "these adapters are for a base with bidirectional attention: load it with AutoModel.from_pretrained(%r%s)",
      base,
      options,
    )
  return {"base": base, "options": options}
