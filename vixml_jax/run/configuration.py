"""Checks the values of a config, and writes and reads it as JSON."""

from collections.abc import Callable
import itertools
import json
from pathlib import Path
import re
from typing import Any

from ml_collections import ConfigDict

from vixml_jax.errors import InputError
from vixml_jax.files import new_file, read_json_object
from vixml_jax.input.prompt import template_words
from vixml_jax.models.attention_call import IMPLEMENTATIONS
from vixml_jax.models.dual_encoder import METHODS
from vixml_jax.models.quantized import LARGEST
from vixml_jax.models.transformer import SAVED_NAMES
from vixml_jax.run.encoder_checks import check_encoder

_Check = tuple[Callable[[Any], bool], str]
_POSITIVE: _Check = (lambda x: x > 0, "must be above 0")
_NOT_NEGATIVE: _Check = (lambda x: x >= 0, "must not be negative")
_SHARE: _Check = (lambda x: 0 <= x < 1, "must be at least 0 and below 1")
_UNIT: _Check = (lambda x: 0 <= x <= 1, "must be between 0 and 1")
_TRUE_OR_FALSE: _Check = (lambda x: isinstance(x, bool), "must be True or False")
_POWER_OF_TWO_OR_0: _Check = (
  lambda x: x >= 0 and x & (x - 1) == 0,
  "must be a power of two, or 0 for a size that depends on the number of labels",
)
_COUNTS: _Check = (lambda xs: len(xs) > 0 and all(x > 0 for x in xs), "must be a list of numbers above 0")
_NAME: _Check = (bool, "must be set")
# Activations that a layer of each architecture has.
_BERT_SAVED = tuple(name for name in SAVED_NAMES if name != "gate")


def _one_of(*names: str) -> _Check:
  return (lambda x: x in names), "must be one of " + ", ".join(names)


def _some_of(*names: str) -> _Check:
  return (lambda xs: not isinstance(xs, str) and set(xs) <= set(names)), "must be a list of some of " + ", ".join(names)


# Rules of values by key. Keys without a rule may have any value of their type.
_CHECKS: dict[str, _Check] = {
  "name": _NAME,
  "seed": _NOT_NEGATIVE,
  "method": _one_of(*METHODS),
  "dataset.name": _NAME,
  "dataset.data_dir": _NAME,
  "dataset.allow_empty_filter": _TRUE_OR_FALSE,
  "dataset.text_fields": (lambda xs: len(xs) > 0 and set(xs) <= {"title", "content"}, "must be title, content or both"),
  "dataset.max_length": (lambda x: x >= 3, "must be at least 3: two special tokens and one token of the text"),
  "dataset.validation_fraction": (lambda x: 0 <= x < 1 or x == -1, "must be at least 0 and below 1, or -1"),
  "dataset.propensity_a": _POSITIVE,
  "dataset.propensity_b": _NOT_NEGATIVE,
  "images": (lambda x: 0 <= x <= 5, "must be 0 to 5"),
  "features.name": _NAME,
  "features.dim": _POSITIVE,
  "features.preprocessing": _one_of("big_vision", "huggingface", "huggingface_bilinear"),
  "fusion.method": _one_of("early", "late"),
  "fusion.adapter": _one_of("linear", "mlp", "gated"),
  "fusion.residual": _NOT_NEGATIVE,
  "fusion.modality_dropout": _UNIT,
  "fusion.bank": _one_of("auto", "device", "host"),
  "prompt.template": _NAME,
  "prompt.eos": _NAME,
  "encoder.architecture": _one_of("bert", "decoder"),
  "encoder.pooling": _one_of("mean", "last"),
  "encoder.pretrained": _NAME,
  "encoder.vocab_size": _POSITIVE,
  "encoder.num_layers": _POSITIVE,
  "encoder.embed_dim": _POSITIVE,
  "encoder.num_heads": _POSITIVE,
  "encoder.mlp_dim": _POSITIVE,
  "encoder.attention": _one_of(*IMPLEMENTATIONS),
  "encoder.dtype": _one_of("auto", "float32", "bfloat16", "float16"),
  "encoder.residual_dtype": _one_of("", "float32", "bfloat16", "float16"),
  "encoder.base_dtype": (lambda x: x in ("", *LARGEST), "must be empty, or one of " + ", ".join(LARGEST)),
  "prototype.num_heads": _POSITIVE,
  "prototype.mlp_dim": _POSITIVE,
  "prototype.dropout": _SHARE,
  "loss.num_negatives": _POSITIVE,
  "loss.margin_min": _NOT_NEGATIVE,
  "loss.margin_max": _NOT_NEGATIVE,
  "loss.temperature": _POSITIVE,
  "loss.regulariser_weight": _NOT_NEGATIVE,
  "loss.regulariser_margin": _NOT_NEGATIVE,
  "loss.reverse_weight": _NOT_NEGATIVE,
  "train.epochs": _NOT_NEGATIVE,
  "train.batch_size": _POSITIVE,
  "train.learning_rate": _POSITIVE,
  "train.new_learning_rate": _POSITIVE,
  "train.new_init": _one_of("torch", "fan_in"),
  "train.free_vector_learning_rate": _POSITIVE,
  "train.warmup_steps": _NOT_NEGATIVE,
  "train.weight_decay": _NOT_NEGATIVE,
  "train.adam_eps": _POSITIVE,
  "train.clip_norm": _NOT_NEGATIVE,
  "train.free_vectors": _POWER_OF_TWO_OR_0,
  "train.free_vector_init": _one_of("xavier", "cluster_mean"),
  "train.positive_sampling": _one_of("propensity", "uniform"),
  "train.sampling_a": _POSITIVE,
  "train.sampling_b": _NOT_NEGATIVE,
  "train.row_length": _NOT_NEGATIVE,
  "train.chunk_rows": _NOT_NEGATIVE,
  "train.chunks_in": _one_of("encoder", "layer"),
  "train.matryoshka_dims": (
    lambda xs: all(isinstance(x, int) and x > 0 for x in xs) and all(a > b for a, b in itertools.pairwise(xs)),
    "must be empty, or whole numbers above 0 in descending order, each once",
  ),
  "train.bank_dtype": _one_of("float32", "bfloat16"),
  "train.rng_impl": _one_of("threefry2x32", "rbg", "unsafe_rbg"),
  "train.log_every_steps": _POSITIVE,
  "mining.cluster_size": _POSITIVE,
  "mining.start_epoch": _NOT_NEGATIVE,
  "mining.update_epochs": _POSITIVE,
  "mining.doubling_epochs": (lambda xs: all(x >= 0 for x in xs), "must not be negative"),
  "eval.search": _one_of("exact", "scann"),
  "eval.scann_recall": _SHARE,
  "eval.split": _one_of("test", "validation"),
  "eval.every_epochs": _NOT_NEGATIVE,
  "eval.ks": _COUNTS,
  "eval.recall_ks": _COUNTS,
  "eval.bootstrap_samples": _NOT_NEGATIVE,
  "eval.blend": _TRUE_OR_FALSE,
  "eval.classifier_epochs": (lambda x: x >= -1, "must be -1, 0 or more"),
  "eval.baselines": _some_of("tfidf", "untrained", "plt"),
  "eval.small_vectors": (lambda xs: all(x > 0 for x in xs), "must be a list of numbers of dimensions above 0"),
  "eval.test_images": (lambda xs: all(x >= 0 for x in xs), "must be a list of numbers of images, 0 or more"),
  "eval.retrieval_search": _one_of("separate", "joint"),
  "eval.retrieval_hits": _POSITIVE,
  "eval.retrieval_query_hits": _NOT_NEGATIVE,
  "eval.retrieval_lambda": _UNIT,
  "eval.retrieval_temperature": _POSITIVE,
  "checkpoint.every_steps": _POSITIVE,
  "checkpoint.keep": _POSITIVE,
  "track.mlflow_uri": (
    lambda x: not x or re.match(r"https?://.", x) is not None,
    "must be the address of a server, as http://HOST:PORT, or empty",
  ),
  "track.mlflow_experiment": _NAME,
  "profile.steps": (
    lambda x: not x or ((found := re.fullmatch(r"(\d+):(\d+)", x)) is not None and 0 < int(found[1]) <= int(found[2])),
    "must be FIRST:LAST, two steps from 1 on, such as 10:12, or empty",
  ),
}

# Rules of the keys of one architecture.
_ENCODER_CHECKS: dict[str, dict[str, _Check]] = {
  "bert": {
    "encoder.max_position": _POSITIVE,
    "encoder.num_token_types": _NOT_NEGATIVE,
    "encoder.dropout": _SHARE,
    "encoder.attention_dropout": _SHARE,
    "encoder.projection_dropout": _SHARE,
    "encoder.layer_norm_eps": _POSITIVE,
    "encoder.remat_saved": _some_of(*_BERT_SAVED),
  },
  "decoder": {
    "encoder.num_kv_heads": _POSITIVE,
    "encoder.head_dim": (lambda x: x > 0 and x % 2 == 0, "must be even, since rotary embeddings rotate pairs"),
    "encoder.rope_theta": _POSITIVE,
    "encoder.rope_scaling": (
      lambda xs: len(xs) == 0 or (len(xs) == 4 and all(x > 0 for x in xs) and xs[1] < xs[2]),
      "must be empty, or factor,low_freq_factor,high_freq_factor,original_max_position",
    ),
    "encoder.norm_eps": _POSITIVE,
    "encoder.lora_rank": _NOT_NEGATIVE,
    "encoder.remat_saved": _some_of(*SAVED_NAMES),
    "encoder.lora_alpha": _POSITIVE,
    "encoder.param_dtype": _one_of("float32", "bfloat16"),
    "encoder.adapter": (lambda x: isinstance(x, str), "must be the path of a folder, or empty"),
  },
}

# Keys that were added after the first release -> their values for the runs of that release, whose files lack them.
_LATER_KEYS: dict[str, Any] = {
  "dataset.allow_empty_filter": False,
  "method": "prime",
  "encoder.residual_dtype": "",
  "encoder.base_dtype": "",
  "encoder.remat_saved": (),
  "train.chunks_in": "encoder",
  "train.new_init": "fan_in",
  "train.matryoshka_dims": (),
  "encoder.attention": "auto",
  "loss.reverse_weight": 1.0,
  "train.decay_layer_norms": False,
  "eval.scann_recall": 0.0,
  "eval.retrieval_search": "separate",
  "eval.retrieval_query_hits": 0,
  "eval.blend": False,
  "eval.classifier_epochs": 0,
  "eval.baselines": (),
  "track.wandb_project": "",
  "track.mlflow_uri": "",
  "track.mlflow_experiment": "vixml_jax",
  "profile.steps": "",
  "eval.small_vectors": (),
}
_LATER_SECTIONS = ("track", "profile")

# Keys, and sections with a dot at the end, that may differ when a run is continued, since they do not change what it
# computes, or by rounding only.
_FREE_KEYS = (
  "mesh.",
  "eval.",
  "checkpoint.",
  "track.",
  "profile.",
  "dataset.raw_dir",
  "dataset.data_dir",
  "dataset.allow_empty_filter",
  "features.checkpoint",
  "fusion.bank",
  "encoder.attention",
  "encoder.pretrained",  # The folder may move: weights and tokens are compared by their hashes.
  "train.log_every_steps",
)


def flatten_config(config: ConfigDict) -> dict[str, Any]:
  """Returns the values of a config by their dotted keys, such as `train.epochs`."""
  return {
    (f"{key}.{inner}" if inner else key): leaf
    for key, value in config.items()
    for inner, leaf in (flatten_config(value).items() if isinstance(value, ConfigDict) else {"": value}.items())
  }


def check(config: ConfigDict) -> None:
  """Checks that a config has all keys, and that its values are valid.

  Raises:
    InputError: If a key is missing or a value is invalid. The message has the key, its value and the rule.
  """
  values = flatten_config(config)
  _check_values(values, _CHECKS)
  _check_values(values, _ENCODER_CHECKS[values["encoder.architecture"]])
  for small, large in (("loss.margin_min", "loss.margin_max"), ("dataset.max_length", "train.row_length")):
    if values[small] > values[large] and (large, values[large]) != ("train.row_length", 0):
      raise InputError(f"config.{small}={values[small]}: must be at most config.{large}={values[large]}")
  check_encoder(values)
  phrases = [key.removeprefix("prompt.phrases.") for key in values if key.startswith("prompt.phrases.")]
  template_words(values["prompt.template"], phrases, values["images"] > 0 and values["fusion.method"] == "early")
  if values["fusion.residual"] and values["fusion.method"] != "early":
    raise InputError(
      f"config.fusion.residual={values['fusion.residual']}: must be 0 unless config.fusion.method is early"
    )
  if values["eval.retrieval_query_hits"] and values["eval.retrieval_search"] == "joint":
    raise InputError(
      f"config.eval.retrieval_query_hits={values['eval.retrieval_query_hits']}: must be 0 unless "
      "config.eval.retrieval_search is separate; config.eval.retrieval_hits is the number of both together"
    )
  if len(values["eval.test_images"]) and not values["images"]:
    raise InputError(f"config.eval.test_images={values['eval.test_images']}: must be empty, since config.images=0")
  held_out = values["dataset.validation_fraction"] != 0
  for key, wants in (
    ("eval.retrieval_choose", values["eval.retrieval_choose"]),
    ("eval.blend", values["eval.blend"]),
    ("eval.baselines", bool(values["eval.baselines"])),
    ("eval.split", values["eval.split"] == "validation"),
  ):
    if wants and not held_out:
      raise InputError(
        f"config.{key}={values[key]}: needs held-out queries; set config.dataset.validation_fraction above 0"
      )


def _check_values(values: dict[str, Any], checks: dict[str, _Check]) -> None:
  """Checks each value by the rule of its key."""
  for key, (accepts, rule) in checks.items():
    if key not in values:
      raise InputError(f"config.{key}: is missing; start from configs/common.py")
    try:
      accepted = accepts(values[key])
    except TypeError:  # The value has another type, such as a string in a list of numbers.
      accepted = False
    if not accepted:
      raise InputError(f"config.{key}={values[key]!r}: {rule}")


def write(config: ConfigDict, path: Path) -> None:
  """Writes a config as JSON; after a kill or a power cut, the file is the old one or the new one.

  Raises:
    InputError: If the file contains a config with another value of a key that changes the trained parameters, or the
      disk is full.
  """
  text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
  if path.exists():
    # Both as JSON, in which a tuple is a list.
    old, new = (flatten_config(ConfigDict(json.loads(each))) for each in (json.dumps(read(path).to_dict()), text))
    for key in sorted(old.keys() | new.keys()):
      if old.get(key) != new.get(key) and not _is_free(key):
        raise InputError(
          f"{path}: this run was started with {key}={old.get(key)!r}, not {new.get(key)!r}; "
          "use the old value, or another --workdir"
        )
  with new_file(path) as work:
    work.write_text(text + "\n", encoding="utf-8")


def _is_free(key: str) -> bool:
  """Returns whether a key may differ when a run is continued."""
  return key in _FREE_KEYS or any(key.startswith(section) for section in _FREE_KEYS if section.endswith("."))


def read(path: Path) -> ConfigDict:
  """Returns the config in a file that `write` has written, with the keys that were added since.

  Raises:
    InputError: If the file cannot be read or contains no JSON object.
  """
  config = ConfigDict(
    read_json_object(path, absent="set --workdir to the folder of a run", damaged="restore the file, or train again")
  )
  for name in _LATER_SECTIONS:
    if name not in config:
      config[name] = ConfigDict()
  for key, value in _LATER_KEYS.items():
    *sections, name = key.split(".")
    section = config
    for part in sections:
      section = section.get(part, ConfigDict())  # A damaged file may lack a section: `check` names its keys.
    if name not in section:
      section[name] = value
  return config
