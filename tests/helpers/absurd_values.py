"""Values that no key of a config should have, by name, and the keys that accept some of them all the same."""

import contextlib
import math

import numpy as np

ABSURD = {
  "minus one": -1,
  "zero": 0,
  "minus 2^63": -(2**63),
  "2^31": 2**31,
  "2^63": 2**63,
  "10^5000": 10**5000,
  "1e30": 1e30,
  "minus 1e30": -1e30,
  "1e-30": 1e-30,
  "the smallest float": 5e-324,
  "a half": 0.5,
  "NaN": math.nan,
  "infinity": math.inf,
  "minus infinity": -math.inf,
  "None": None,
  "True": True,
  "empty": "",
  "a space": " ",
  "NUL": "a\0b",
  "5,000 characters": 5000 * "a",
  "half a character": "a\ud800",
  "a number as text": "1",
  "a home folder": "~/a",
  "bytes": b"a",
  "an empty list": [],
  "nothing in a list": [None],
  "zero in a list": [0],
  "2^31 in a list": (2**31,),
  "NaN in a list": (math.nan,),
  "NUL in a list": ("a\0b",),
  "a list of 5,000 values": 5000 * (1,),
  "lists in lists": [[[[[[[[1]]]]]]]],
  "a section": {"a": 1},
  "sections in sections": {"a": {"a": {"a": {"a": 1}}}},
  "a complex number": 1j,
  "an array": np.zeros((20, 20)),
  "an object": object(),
}
"""Name -> value."""

_FLAGS = {
  "dataset.allow_empty_filter",
  "encoder.random_init",
  "encoder.remat",
  "encoder.qkv_bias",
  "encoder.qk_norm",
  "encoder.zero_centered_norm",
  "encoder.output_norm",
  "encoder.scale_embedding",
  "encoder.bidirectional",
  "train.decay_layer_norms",
  "train.remat",
  "eval.retrieval_augmented",
  "eval.retrieval_choose",
  "eval.blend",
  "eval.query_texts",
}
_SHARES = {
  "dataset.validation_fraction",
  "dataset.propensity_a",
  "fusion.residual",
  "fusion.modality_dropout",
  "encoder.dropout",
  "encoder.attention_dropout",
  "encoder.projection_dropout",
  "prototype.dropout",
  "loss.margin_min",
  "loss.margin_max",
  "loss.regulariser_weight",
  "loss.regulariser_margin",
  "loss.reverse_weight",
  "train.weight_decay",
  "train.classifier_weight",
  "train.minutes",
  "train.clip_norm",
  "train.sampling_a",
  "eval.scann_recall",
  "eval.retrieval_lambda",
  "eval.classifier_share",
  "baselines.other.P@1",
}
_DROPOUTS = {"encoder.dropout", "encoder.attention_dropout", "encoder.projection_dropout", "prototype.dropout"}
_RATES = {
  "train.learning_rate",
  "train.new_learning_rate",
  "train.free_vector_learning_rate",
  "train.classifier_learning_rate",
}
_TEXTS = {
  "track.wandb_project",
  "track.mlflow_experiment",
  "prompt.eos",
  "prompt.template",  # Its range; that it has no such part is found afterwards.
  "prompt.phrases.I",
  "prompt.phrases.T",
  "prompt.phrases.T2",
}
_LISTS = {
  "encoder.remat_saved",
  "encoder.rope_scaling",
  "train.matryoshka_dims",
  "mining.doubling_epochs",
  "eval.baselines",
  "eval.test_images",
  "eval.small_vectors",
}
_PLACES = {
  "name",
  "dataset.raw_dir",
  "dataset.data_dir",
  "features.name",
  "features.checkpoint",
  "encoder.pretrained",
  "encoder.adapter",
}

ACCEPTED = {
  "minus one": {
    "train.minutes",
    "train.classifier_weight",
    "eval.classifier_epochs",
    "eval.classifier_share",
    "dataset.validation_fraction",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
  },
  "zero": _SHARES
  | {
    "seed",
    "images",
    "mesh.fsdp",
    "encoder.num_token_types",
    "encoder.lora_rank",
    "encoder.attention_scalar",
    "encoder.window",
    "train.epochs",
    "train.warmup_steps",
    "train.free_vectors",
    "train.row_length",
    "train.chunk_rows",
    "mining.start_epoch",
    "eval.every_epochs",
    "eval.classifier_epochs",
    "eval.bootstrap_samples",
    "eval.retrieval_query_hits",
  },
  "2^31": {"encoder.rope_theta", "encoder.local_rope_theta"},
  "1e-30": (_SHARES - _DROPOUTS) | _RATES,
  "the smallest float": (_SHARES - _DROPOUTS) | _RATES,
  "a half": _SHARES
  | _RATES
  | {
    "dataset.propensity_b",
    "encoder.layer_norm_eps",
    "encoder.norm_eps",
    "encoder.lora_alpha",
    "loss.temperature",
    "train.adam_eps",
    "train.sampling_b",
    "eval.retrieval_temperature",
  },
  "True": _FLAGS,
  "empty": {
    "dataset.raw_dir",
    "features.checkpoint",
    "features.variant",
    "encoder.adapter",
    "encoder.residual_dtype",
    "encoder.base_dtype",
    "track.wandb_project",
    "track.mlflow_uri",
    "profile.steps",
    "prompt.phrases.I",
    "prompt.phrases.T",
    "prompt.phrases.T2",
  },
  "a space": {"track.wandb_project", "prompt.phrases.I", "prompt.phrases.T", "prompt.phrases.T2"},
  "5,000 characters": {"prompt.phrases.I", "prompt.phrases.T", "prompt.phrases.T2"},
  "a number as text": (_TEXTS | _PLACES),
  "a home folder": _TEXTS,
  "an empty list": _LISTS,
  "zero in a list": {"mining.doubling_epochs", "eval.test_images"},
}
"""Name of a value -> keys whose range has it; values that are missing here are in no range."""


@contextlib.contextmanager
def changed(config, key, value):
  """Gives a key of an unlocked config any value, whatever its type, within the block."""
  *sections, name = key.split(".") if not key.startswith("baselines.") else key.split(".", 2)
  section = config
  for part in sections:
    section = section[part]
  before = section[name]
  del section[name]  # Otherwise the new value would be converted to the type of the old one.
  section[name] = value
  try:
    yield config
  finally:
    del section[name]
    section[name] = before
