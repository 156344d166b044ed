"""Checks that the values of several keys of an encoder fit together."""

from typing import Any

from vixml_jax.errors import InputError


def check_encoder(values: dict[str, Any]) -> None:
  """Checks heads, prefixes of the embeddings, recomputation, the frozen base and adapters.

  Args:
    values: The values of a config by their dotted keys. Each is valid by itself.

  Raises:
    InputError: Values do not fit together; the message names the keys.
  """
  _check_heads(values)
  _check_prefixes(values)
  _check_recomputation(values)
  _check_base_dtype(values)
  if values["encoder.architecture"] == "decoder":
    _check_adapters(values)
    _check_window(values)


def _check_heads(values: dict[str, Any]) -> None:
  """Checks that numbers of heads divide the widths that the heads share."""
  split = [("prototype.num_heads", "encoder.embed_dim")] if values["method"] == "prime" else []
  if values["encoder.architecture"] == "decoder":
    split.append(("encoder.num_kv_heads", "encoder.num_heads"))
  # The heads of a decoder may have any width, but those of the late fusion layer share the embedding.
  if values["encoder.architecture"] == "bert" or (values["images"] and values["fusion.method"] == "late"):
    split.append(("encoder.num_heads", "encoder.embed_dim"))
  for heads, shared in split:
    if values[shared] % values[heads]:
      raise InputError(f"config.{heads}={values[heads]}: must divide config.{shared}={values[shared]}")


def _check_prefixes(values: dict[str, Any]) -> None:
  """Checks that no prefix is longer than the embedding."""
  width = values["encoder.embed_dim"]
  for key in ("train.matryoshka_dims", "eval.small_vectors"):
    if max(values[key], default=0) > width:
      raise InputError(f"config.{key}={tuple(values[key])!r}: must be at most config.encoder.embed_dim={width}")


def _check_recomputation(values: dict[str, Any]) -> None:
  """Checks that what is recomputed in the backward pass, and what is stored instead, fit together."""
  saved, layer = values["encoder.remat_saved"], values["train.chunks_in"] == "layer"
  if len(saved) and (layer or not values["encoder.remat"]):
    key, needed = ("train.chunks_in", "'encoder'") if layer else ("encoder.remat", "True")
    raise InputError(
      f"config.encoder.remat_saved={saved!r}: needs config.{key}={needed}; otherwise nothing is saved by name"
    )
  if layer and not values["train.remat"]:
    raise InputError("config.train.chunks_in='layer': needs config.train.remat=True, since it recomputes layers")


def _check_base_dtype(values: dict[str, Any]) -> None:
  """Checks that only the frozen base of a decoder is quantized."""
  if not values["encoder.base_dtype"]:
    return
  start = f"config.encoder.base_dtype={values['encoder.base_dtype']!r}: must be empty, since "
  if values["encoder.architecture"] != "decoder":
    raise InputError(f"{start}config.encoder.architecture={values['encoder.architecture']!r} has no frozen base")
  if not values["encoder.lora_rank"]:
    raise InputError(f"{start}config.encoder.lora_rank=0 trains all parameters, and quantized ones cannot be trained")


def _check_adapters(values: dict[str, Any]) -> None:
  """Checks the keys of adapters. Without adapters, the base is trained, and bfloat16 would lose its small updates."""
  if not values["encoder.lora_rank"] and values["encoder.param_dtype"] != "float32":
    raise InputError(
      f"config.encoder.param_dtype={values['encoder.param_dtype']!r}: must be float32, since "
      "config.encoder.lora_rank=0 trains all parameters"
    )
  if values["encoder.adapter"] and not values["encoder.lora_rank"]:
    raise InputError(
      f"config.encoder.adapter={values['encoder.adapter']!r}: needs config.encoder.lora_rank, which is 0; set "
      "it to the rank of these adapters"
    )


def _check_window(values: dict[str, Any]) -> None:
  """Checks that local layers have a window."""
  if values["encoder.global_every"] > 1 and not values["encoder.window"]:
    raise InputError(
      f"config.encoder.window=0: must be positive, since config.encoder.global_every={values['encoder.global_every']}; "
      "set it to the window of the weights, or global_every to 1"
    )
