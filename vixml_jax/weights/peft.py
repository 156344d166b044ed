"""Reads and writes LoRA adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from vixml_jax.errors import InputError, listed
from vixml_jax.files import read_json_object
from vixml_jax.weights import engine
from vixml_jax.weights.hf_folder import SafetensorsFolder
from vixml_jax.weights.placement import place
from vixml_jax.weights.tables import TEXT_PREFIXES, Rule, Table

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model"
_PREFIX = "base_model.model."  # Prefix that PEFT adds to the names of an AutoModel.

# Our projection -> PEFT's projection, and the layouts of A (r x inputs in PEFT) and B (outputs x r in PEFT).
_PROJECTIONS: dict[str, tuple[str, str, str]] = {
  "attention/query": ("self_attn.q_proj", "r d -> d r", "(h k) r -> r h k"),
  "attention/key": ("self_attn.k_proj", "r d -> d r", "(h k) r -> r h k"),
  "attention/value": ("self_attn.v_proj", "r d -> d r", "(h k) r -> r h k"),
  "attention/output": ("self_attn.o_proj", "r (h k) -> h k r", "d r -> r d"),
  "gate": ("mlp.gate_proj", "r d -> d r", "m r -> r m"),
  "up": ("mlp.up_proj", "r d -> d r", "m r -> r m"),
  "down": ("mlp.down_proj", "r m -> m r", "d r -> r d"),
}
_TARGETS = sorted(theirs.partition(".")[2] for theirs, _, _ in _PROJECTIONS.values())

# Adapters of the decoders, whose projections have the same names.
TABLE = Table(
  name="PEFT LoRA",
  rules=tuple(
    Rule(f"layers/{ours}/lora_{side}", f"layers.{{layer}}.{theirs}.lora_{side.upper()}.weight", layout)
    for ours, (theirs, *layouts) in _PROJECTIONS.items()
    for side, layout in zip("ab", layouts, strict=True)
  ),
  ignored={},
  prefixes=(_PREFIX, *TEXT_PREFIXES),  # Some of these are present if the base was a CausalLM or had an image tower.
)

# Key -> the values that are supported. A config without the key is accepted.
_REQUIRED: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  # Other initializations (pissa, olora, corda, ...) also change the base, which then differs from the published one.
  "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# Keys that do not change what the adapters compute. Any other key that is set requests an unsupported feature.
_IMMATERIAL = frozenset(
  (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
  )
)
_LARGEST = 1_000_000  # Of the rank and of lora_alpha.
_OURS = ("r", "lora_alpha", "use_rslora", "target_modules")


def load_adapter(
  folder: str | os.PathLike[str], abstract: Mapping[str, Any], alpha: float, shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Reads the adapters of a PEFT folder, for an AutoModel or a CausalLM.

  The base that they were trained on is not checked beyond its shapes, because PEFT stores only its path.

  Args:
    folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
    abstract: Nested dict of arrays or ShapeDtypeStructs: the adapters of the encoder, as `lora.split_lora` returns
      them.
    alpha: The encoder's `lora_alpha`. Adapters are scaled by alpha / sqrt(rank).
    shardings: Nested dict with the keys of `abstract` and a NamedSharding at each leaf; see `placement.place`. None to
      read to the host.

  Returns:
    Nested dict with the keys of `abstract`: sharded arrays, or numpy arrays if there are no shardings.

  Raises:
    InputError: If a file is missing or damaged, the config is not rank-stabilized LoRA with this rank and alpha on
      these projections, or the tensors do not fit exactly.
  """
  source = _open(Path(folder), abstract, alpha)
  if shardings is None:
    return engine.apply(TABLE, source, abstract)
  return place(TABLE, source, abstract, shardings)


def check_adapter(folder: str | os.PathLike[str], abstract: Mapping[str, Any], alpha: float) -> None:
  """Checks that `load_adapter` can read a folder, without reading a tensor; arguments and errors are the same."""
  engine.match(TABLE, _open(Path(folder), abstract, alpha), abstract)


def _open(folder: Path, abstract: Mapping[str, Any], alpha: float) -> SafetensorsFolder:
  """Returns the tensors of a folder after checking that its config describes these adapters."""
  _check_config(folder / _CONFIG, abstract, alpha)
  if not (folder / f"{_WEIGHTS}.safetensors").is_file():
    raise InputError(
      f"{folder}: has no {_WEIGHTS}.safetensors; save the adapter again with PEFT's save_pretrained, without"
      " safe_serialization=False"
    )
  return SafetensorsFolder(folder, _WEIGHTS)


def save_adapter(
  params: Mapping[str, Any],
  folder: str | os.PathLike[str],
  base: str,
  alpha: float,
  revision: str | None = None,
  part: str = "",
) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained` adds to the AutoModel of the base.

  Args:
    params: Nested dict of arrays: the adapters of the encoder, as `lora.split_lora` returns them.
    folder: Folder to write to. It is created if it does not exist.
    base: Path of the base model, or its name on the hub.
    alpha: The encoder's `lora_alpha`.
    revision: Revision of the base on the hub; None for the newest.
    part: Name of the decoder within the base; see `hf_config.text_part`.

  Raises:
    InputError: If the parameters are not the adapters of all seven projections.
  """
  inner = f"{part}." if part else ""
  tensors = {f"{_PREFIX}{inner}{name}": tensor for name, tensor in engine.invert(TABLE, params).items()}
  config = {
    "peft_type": "LORA",
    "task_type": "FEATURE_EXTRACTION",
    "base_model_name_or_path": base,
    "revision": revision,
    "r": _rank(params),
    "lora_alpha": _short(alpha),
    "use_rslora": True,
    "lora_dropout": 0.0,
    "bias": "none",
    # The image tower has projections of the same names.
    "target_modules": rf".*{part}\.layers\..*\.({'|'.join(_TARGETS)})" if part else _TARGETS,
    "inference_mode": True,
  }
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / f"{_WEIGHTS}.safetensors", metadata={"format": "pt"})
  (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rank(params: Mapping[str, Any]) -> int:
  """Returns the common rank of adapters; 0 if there are none."""
  return next((leaf.shape[-1] for path, leaf in engine.flatten_tree(params).items() if path.endswith("lora_a")), 0)


def _short(number: float) -> float:
  """Returns the number as an int if it is integral."""
  return int(number) if number == int(number) else number


def _check_config(path: Path, abstract: Mapping[str, Any], alpha: float) -> None:
  """Raises InputError if a config describes other adapters than `abstract` and `alpha`."""
  config = read_json_object(path, absent="give a folder that PEFT saved", damaged="save it again")
  for key, wanted in _REQUIRED.items():
    if config.get(key, wanted[0]) not in wanted:
      raise InputError(f"{path}: {key} is {config[key]!r:.60}; it must be {_either(wanted)}")
  for key, value in config.items():
    if value and key not in _IMMATERIAL and key not in _REQUIRED and key not in _OURS:
      raise InputError(
        f"{path}: {listed([key])} is {value!r:.60}; only plain LoRA, equal on every layer, is supported: set it to null"
      )
  for key in ("r", "lora_alpha"):
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
      raise InputError(f"{path}: {key} is {value!r:.40}; it must be a positive number of at most {_LARGEST:,}")
  stabilized = config.get("use_rslora", False)
  if not isinstance(stabilized, bool):
    raise InputError(f"{path}: use_rslora is {stabilized!r:.40}; it must be true or false")
  _check_scale(path, config, _rank(abstract), alpha)
  targets = config.get("target_modules")
  if not isinstance(targets, list | str | None):
    raise InputError(f"{path}: target_modules is {targets!r:.40}; it must be a list or a pattern")
  # A pattern such as `all-linear` is not evaluated here: the tensors show which projections it matched.
  if isinstance(targets, list) and sorted({str(name).rpartition(".")[2] for name in targets}) != _TARGETS:
    raise InputError(
      f"{path}: target_modules are {', '.join(sorted(map(str, targets))):.200}; they must be"
      f" {', '.join(_TARGETS)}: train adapters of these"
    )


def _check_scale(path: Path, config: Mapping[str, Any], rank: int, alpha: float) -> None:
  """Raises InputError if the rank or the scale of the adapters differs from the encoder's."""
  theirs = config["lora_alpha"]
  if config["r"] != rank:
    raise InputError(f"{path}: r is {config['r']}, but encoder.lora_rank is {rank}; set it to {config['r']}")
  if not config.get("use_rslora", False):
    stable = f"{theirs / math.sqrt(rank):.8g}"
    raise InputError(
      f"{path}: use_rslora is false, which scales by lora_alpha / r, but the encoder scales by lora_alpha / sqrt(r);"
      f" set use_rslora to true and lora_alpha to {stable} (= {theirs} / sqrt({rank})) in the file, which is"
      f" equivalent, and encoder.lora_alpha to {stable}"
    )
  if theirs != alpha:
    raise InputError(f"{path}: lora_alpha is {theirs}, but encoder.lora_alpha is {_short(alpha)}; set it to {theirs}")


def _either(values: tuple[Any, ...]) -> str:
  return " or ".join(map(repr, values))
