"""Reads and writes LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from vixml_jax.errors import InputError
from vixml_jax.files import read_json_object
from vixml_jax.weights import engine
from vixml_jax.weights.hf_folder import SafetensorsFolder
from vixml_jax.weights.placement import place
from vixml_jax.weights.tables import Rule, Table

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model"
_PREFIX = "base_model.model."  # What PEFT puts before the names of an AutoModel.

# Our projection -> theirs, and the layouts of A (theirs is r x inputs) and B (outputs x r).
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

# Adapters of a Qwen2, Qwen3 or Llama, which call their projections alike.
TABLE = Table(
  name="PEFT LoRA",
  rules=tuple(
    Rule(f"layers/{ours}/lora_{side}", f"layers.{{layer}}.{theirs}.lora_{side.upper()}.weight", layout)
    for ours, (theirs, *layouts) in _PROJECTIONS.items()
    for side, layout in zip("ab", layouts, strict=True)
  ),
  ignored={},
  prefixes=(_PREFIX, "model."),  # The second stands there if the base was a CausalLM.
)

# What a config has to say, if it speaks of it at all.
_REQUIRED: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  # Other ways to begin (pissa, olora, corda, ...) also change the base, which then is not the published one.
  "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# Keys that do not change what the adapters compute. Any other key that is set asks for something we do not do.
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
_OURS = ("r", "lora_alpha", "use_rslora", "target_modules")


def load_adapter(
  folder: str | os.PathLike[str], abstract: Mapping[str, Any], alpha: float, shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Reads the adapters of a PEFT folder, of an AutoModel or a CausalLM.

  Which base they were trained on is not checked beyond the shapes: PEFT only notes a path.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    abstract: nested dict of arrays or ShapeDtypeStructs: the encoder's adapters, as `layers.split_lora` returns them.
    alpha: the encoder's `lora_alpha`; adapters are scaled by alpha / sqrt(rank).
    shardings: nested dict with the keys of `abstract`, a NamedSharding at each leaf; see `placement.place`.

  Returns:
    Nested dict like `abstract`: sharded arrays, or numpy arrays if there are no shardings.

  Raises:
    InputError: no such files, a damaged one, a config that asks for anything but rank-stabilized LoRA of this rank
      and alpha on these projections, or tensors that do not fit exactly.
  """
  source = _open(Path(folder), abstract, alpha)
  if shardings is None:
    return engine.apply(TABLE, source, abstract)
  return place(TABLE, source, abstract, shardings)


def check_adapter(folder: str | os.PathLike[str], abstract: Mapping[str, Any], alpha: float) -> None:
  """Raises what `load_adapter` would raise, and reads no tensor."""
  engine.match(TABLE, _open(Path(folder), abstract, alpha), abstract)


def _open(folder: Path, abstract: Mapping[str, Any], alpha: float) -> SafetensorsFolder:
  """The folder's tensors, once its config is found to describe these adapters."""
  _check_config(folder / _CONFIG, abstract, alpha)
  if not (folder / f"{_WEIGHTS}.safetensors").is_file():
    raise InputError(
      f"{folder}: has no {_WEIGHTS}.safetensors; save the adapter again with PEFT's save_pretrained, which writes it"
      " unless told safe_serialization=False"
    )
  return SafetensorsFolder(folder, _WEIGHTS)


def save_adapter(
  params: Mapping[str, Any], folder: str | os.PathLike[str], base: str, alpha: float, revision: str | None = None
) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained` puts onto the base's AutoModel.

  Args:
    params: nested dict of arrays, the encoder's adapters, as `layers.split_lora` returns them.
    folder: made if it does not exist.
    base: path of the base model, or its name on the hub.
    alpha: the encoder's `lora_alpha`.
    revision: of the base on the hub; None for the newest.

  Raises:
    InputError: the parameters are not the adapters of all seven projections.
  """
  tensors = {f"{_PREFIX}{name}": tensor for name, tensor in engine.invert(TABLE, params).items()}
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
    "target_modules": _TARGETS,
    "inference_mode": True,
  }
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / f"{_WEIGHTS}.safetensors", metadata={"format": "pt"})
  (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rank(params: Mapping[str, Any]) -> int:
  """The rank of adapters, which all have in common; 0 if there are none."""
  return next((leaf.shape[-1] for path, leaf in engine.flatten_tree(params).items() if path.endswith("lora_a")), 0)


def _short(number: float) -> float:
  """The number, as an integer if it is one."""
  return int(number) if number == int(number) else number


def _check_config(path: Path, abstract: Mapping[str, Any], alpha: float) -> None:
  """Refuses a config of other adapters than those that `abstract` and `alpha` describe."""
  config = read_json_object(path, absent="name a folder that PEFT saved", damaged="save it again")
  for key, wanted in _REQUIRED.items():
    if config.get(key, wanted[0]) not in wanted:
      raise InputError(f"{path}: {key} is {config[key]!r}; only {_either(wanted)} is read")
  for key, value in config.items():
    if value and key not in _IMMATERIAL and key not in _REQUIRED and key not in _OURS:
      raise InputError(f"{path}: {key} is {value!r}; only plain LoRA is read, the same on every layer: null is wanted")
  for key in ("r", "lora_alpha"):
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
      raise InputError(f"{path}: {key} is {value!r}; a positive number is wanted")
  _check_scale(path, config, _rank(abstract), alpha)
  targets = config.get("target_modules")
  # A pattern (`all-linear`) is PEFT's business; what it hit is seen from the tensors.
  if isinstance(targets, list) and sorted({str(name).rpartition(".")[2] for name in targets}) != _TARGETS:
    raise InputError(
      f"{path}: target_modules are {', '.join(sorted(map(str, targets)))}; the encoder has adapters on"
      f" {', '.join(_TARGETS)}: train these"
    )


def _check_scale(path: Path, config: Mapping[str, Any], rank: int, alpha: float) -> None:
  """Refuses another rank than the encoder's, and another factor before the adapters."""
  theirs = config["lora_alpha"]
  if config["r"] != rank:
    raise InputError(f"{path}: r is {config['r']}, but encoder.lora_rank is {rank}; set it to {config['r']}")
  if not config.get("use_rslora", False):
    stable = f"{theirs / math.sqrt(rank):.8g}"
    raise InputError(
      f"{path}: use_rslora is false, a scale of lora_alpha / r, but the encoder's is lora_alpha / sqrt(r); write"
      f" use_rslora true and lora_alpha {stable} (= {theirs} / sqrt({rank})) there, which computes the same, and set"
      f" encoder.lora_alpha to {stable}"
    )
  if theirs != alpha:
    raise InputError(f"{path}: lora_alpha is {theirs}, but encoder.lora_alpha is {_short(alpha)}; set it to {theirs}")


def _either(values: tuple[Any, ...]) -> str:
  return " or ".join(map(repr, values))
