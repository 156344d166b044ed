"""The range of every key: what its value must be. `tests/run/test_config_ranges.py` compares the keys with the configs.

A bound is far beyond what a run can use (10 million labels, batches of a million queries, pods of thousands of chips),
so that it only refuses mistakes. Where less is possible with other values, data or devices, `combinations` and
`run.limits` refuse it.
"""

from vixml_jax.datasets.builders import BUILDERS
from vixml_jax.images.preprocess import KINDS
from vixml_jax.models.attention_call import IMPLEMENTATIONS
from vixml_jax.models.decoder import ACTIVATIONS
from vixml_jax.models.dual_encoder import METHODS
from vixml_jax.models.fusion import ADAPTERS
from vixml_jax.models.fusion import METHODS as FUSION_METHODS
from vixml_jax.models.quantized import LARGEST
from vixml_jax.models.transformer import SAVED_NAMES
from vixml_jax.run.configuration.rules import (
  Choice,
  Flag,
  Number,
  Pattern,
  Place,
  RopeScaling,
  Several,
  Text,
  ValueRule,
  Whole,
)
from vixml_jax.weights.siglip import VARIANTS

_LARGEST = 2**31 - 1  # Steps, rows and seeds are int32 on the devices.
_ANY_COUNT = Whole(1, _LARGEST)
_ANY_COUNT_OR_NONE = Whole(0, _LARGEST)
_OWN = ((0, "for one that suits the data and devices"),)
_SIZE = Whole(1, 2**20)  # Width of a layer.
_HEADS = Whole(1, 4096)
_TOKENS = 2**18  # Longest row of tokens.
_DEVICES = Whole(1, 2**20, also=((-1, "for the remaining devices"),))
_RATE = Number(0, 1, above_low=True)  # A step of Adam changes each parameter by about its learning rate.
_WEIGHT = Number(0, 1000)
_COSINE = Number(0, 2)  # Differences of cosines.
_TEMPERATURE = Number(1e-6, 1e6)
_EPSILON = Number(1e-20, 1)  # Smaller ones are lost in float32, and gradients are not finite.
# The probability is rounded to a multiple of 1/256, which must be neither 0 nor 1.
_DROPOUT = Number(0.002, 0.998, also=(0,))
_SHARE = Number(0, 1)
_BELOW_ONE = Number(0, 1, below_high=True)
_EXPONENT = Number(0, 10)
_OFFSET = Number(1e-6, 1e6)  # Labels without training queries have a frequency of 0, so 0 would divide by zero.
_KS = Several(Whole(1, 10_000), least=1)
_HITS = 10_000
_CHOSEN_NAME = Text(1, 200)
_FLOATS = ("float32", "bfloat16", "float16")

RANGES: dict[str, ValueRule] = {
  "name": Place(),
  "seed": Whole(0, _LARGEST),
  "method": Choice(METHODS),
  "dataset.name": Choice(tuple(BUILDERS)),
  "dataset.raw_dir": Place(empty=True),
  "dataset.data_dir": Place(),
  "dataset.allow_empty_filter": Flag(),
  "dataset.text_fields": Several(Choice(("title", "content")), least=1, most=2, once=True),
  "dataset.max_length": Whole(3, _TOKENS),  # Two special tokens and one token of the text.
  "dataset.validation_fraction": Number(0, 1, below_high=True, also=(-1,)),
  "dataset.propensity_a": _EXPONENT,
  "dataset.propensity_b": _OFFSET,
  "images": Whole(0, 5),
  "features.name": Place(inner=False),
  "features.dim": _SIZE,
  "features.checkpoint": Place(empty=True),
  "features.variant": Choice(("", *VARIANTS)),
  "features.preprocessing": Choice(KINDS),
  "fusion.method": Choice(FUSION_METHODS),
  "fusion.adapter": Choice(ADAPTERS),
  "fusion.residual": Number(0, 100),
  "fusion.modality_dropout": _SHARE,
  "fusion.bank": Choice(("auto", "device", "host")),
  "prompt.template": Text(1, 1000),
  "prompt.eos": Text(1, 1000),
  "encoder.architecture": Choice(("bert", "decoder")),
  "encoder.pooling": Choice(("mean", "last")),
  "encoder.pretrained": Place(),
  "encoder.random_init": Flag(),
  "encoder.vocab_size": Whole(1, 2**24),
  "encoder.num_layers": Whole(1, 1000),
  "encoder.embed_dim": _SIZE,
  "encoder.num_heads": _HEADS,
  "encoder.mlp_dim": _SIZE,
  "encoder.attention": Choice(IMPLEMENTATIONS),
  "encoder.dtype": Choice(("auto", *_FLOATS)),
  "encoder.residual_dtype": Choice(("", *_FLOATS)),
  "encoder.base_dtype": Choice(("", *LARGEST)),
  "encoder.remat": Flag(),
  "prototype.num_heads": _HEADS,
  "prototype.mlp_dim": _SIZE,
  "prototype.dropout": _DROPOUT,
  "loss.num_negatives": Whole(1, 2**20),
  "loss.margin_min": _COSINE,
  "loss.margin_max": _COSINE,
  "loss.temperature": _TEMPERATURE,
  "loss.regulariser_weight": _WEIGHT,
  "loss.regulariser_margin": _COSINE,
  "loss.reverse_weight": _WEIGHT,
  "train.epochs": Whole(0, 10**6),
  "train.minutes": Number(0, 10**6, also=(-1,)),
  "train.batch_size": Whole(1, 2**22),
  "train.learning_rate": _RATE,
  "train.new_learning_rate": _RATE,
  "train.new_init": Choice(("torch", "fan_in")),
  "train.free_vector_learning_rate": _RATE,
  "train.classifier_weight": Number(0, 1000, also=(-1,)),
  "train.classifier_learning_rate": _RATE,
  "train.warmup_steps": _ANY_COUNT_OR_NONE,
  "train.weight_decay": Number(0, 100),
  "train.decay_layer_norms": Flag(),
  "train.adam_eps": _EPSILON,
  "train.clip_norm": Number(0, 1e9),
  "train.free_vectors": Whole(1, 2**30, also=((0, "for a number that suits the number of labels"),), power_of_two=True),
  "train.free_vector_init": Choice(("xavier", "cluster_mean")),
  "train.positive_sampling": Choice(("propensity", "uniform")),
  "train.sampling_a": _EXPONENT,
  "train.sampling_b": _OFFSET,
  "train.row_length": Whole(3, _TOKENS, also=_OWN),
  "train.chunk_rows": Whole(1, 2**22, also=_OWN),
  "train.remat": Flag(),
  "train.chunks_in": Choice(("encoder", "layer")),
  "train.matryoshka_dims": Several(_SIZE, descending=True),
  "train.bank_dtype": Choice(("float32", "bfloat16")),
  "train.rng_impl": Choice(("threefry2x32", "rbg", "unsafe_rbg")),
  "train.log_every_steps": _ANY_COUNT,
  "mining.cluster_size": _ANY_COUNT,
  "mining.start_epoch": _ANY_COUNT_OR_NONE,
  "mining.update_epochs": _ANY_COUNT,
  "mining.doubling_epochs": Several(_ANY_COUNT_OR_NONE),
  "mesh.data": _DEVICES,
  "mesh.fsdp": Whole(1, 2**20, also=((-1, "for the remaining devices"), *_OWN)),
  "mesh.tensor": _DEVICES,
  "eval.search": Choice(("exact", "scann")),
  "eval.scann_recall": _BELOW_ONE,
  "eval.split": Choice(("test", "validation")),
  "eval.every_epochs": _ANY_COUNT_OR_NONE,
  "eval.ks": _KS,
  "eval.recall_ks": _KS,
  "eval.bootstrap_samples": Whole(0, 10_000),
  "eval.retrieval_augmented": Flag(),
  "eval.retrieval_search": Choice(("separate", "joint")),
  "eval.retrieval_hits": Whole(1, _HITS),
  "eval.retrieval_query_hits": Whole(0, _HITS),
  "eval.retrieval_lambda": _SHARE,
  "eval.retrieval_temperature": _TEMPERATURE,
  "eval.retrieval_choose": Flag(),
  "eval.blend": Flag(),
  "eval.query_texts": Flag(),
  "eval.classifier_share": Number(0, 1, also=(-1,)),
  "eval.classifier_epochs": Whole(0, 10**6, also=((-1, "for a number that suits the data and devices"),)),
  "eval.baselines": Several(Choice(("tfidf", "untrained", "plt")), most=3, once=True),
  "eval.test_images": Several(Whole(0, 5), most=6, once=True),
  "eval.small_vectors": Several(Whole(1, _SIZE.high, also=((-1, "for those of train.matryoshka_dims"),)), once=True),
  "checkpoint.every_steps": _ANY_COUNT,
  "checkpoint.keep": _ANY_COUNT,
  "track.wandb_project": Text(0, 500),
  "track.mlflow_uri": Pattern(r"https?://[!-~]{1,2000}", "empty, or the address of a server, as http://HOST:PORT"),
  "track.mlflow_experiment": Text(1, 500),
  "profile.steps": Pattern(
    r"([1-9][0-9]{0,9}):([1-9][0-9]{0,9})", "empty, or FIRST:LAST, two steps from 1 on, such as 10:12", ascending=True
  ),
}
"""Key -> its rule; the keys of the encoder's architecture are in `OF_ARCHITECTURES`."""

OF_ARCHITECTURES: dict[str, dict[str, ValueRule]] = {
  "bert": {
    "encoder.max_position": Whole(1, _TOKENS),
    "encoder.num_token_types": Whole(0, 1000),
    "encoder.dropout": _DROPOUT,
    "encoder.attention_dropout": _DROPOUT,
    "encoder.projection_dropout": _DROPOUT,
    "encoder.layer_norm_eps": _EPSILON,
    "encoder.remat_saved": Several(Choice(tuple(name for name in SAVED_NAMES if name != "gate")), once=True),
  },
  "decoder": {
    "encoder.num_kv_heads": _HEADS,
    "encoder.head_dim": Whole(2, 8192, even=True),  # Rotary embeddings rotate pairs.
    "encoder.rope_theta": Number(1, 1e12),
    "encoder.rope_scaling": RopeScaling(),
    "encoder.norm_eps": _EPSILON,
    "encoder.qkv_bias": Flag(),
    "encoder.qk_norm": Flag(),
    "encoder.zero_centered_norm": Flag(),
    "encoder.output_norm": Flag(),
    "encoder.activation": Choice(tuple(ACTIVATIONS)),
    "encoder.scale_embedding": Flag(),
    "encoder.attention_scalar": Whole(0, 2**20),
    "encoder.global_every": Whole(1, 2**20),
    "encoder.window": Whole(0, _TOKENS),
    "encoder.local_rope_theta": Number(1, 1e12),
    "encoder.bidirectional": Flag(),
    "encoder.remat_saved": Several(Choice(SAVED_NAMES), once=True),
    "encoder.lora_rank": Whole(0, 2**16),
    "encoder.lora_alpha": Number(1e-6, 1e6),
    "encoder.param_dtype": Choice(("float32", "bfloat16")),
    "encoder.adapter": Place(empty=True),
  },
}
"""Architecture -> the further keys of its encoders."""

OF_SECTIONS: dict[tuple[str, ...], ValueRule] = {
  ("prompt", "phrases", "*"): Text(0, 10_000),
  ("baselines", "*", "*"): Number(0, 100),  # Metrics in percent.
}
"""Parts of the keys that the user chooses, where * is any name -> the rule of their values."""


def rule_of(key: str, architecture: str) -> ValueRule | None:
  """Returns the rule of a key with an architecture; None if there is no such key."""
  found = RANGES.get(key) or OF_ARCHITECTURES[architecture].get(key)
  if found is None:
    parts = key.split(".")
    for pattern, rule in OF_SECTIONS.items():
      if len(parts) == len(pattern) and all(map(_fits, pattern, parts)):
        return rule
  return found


def _fits(wanted: str, part: str) -> bool:
  """Returns whether a part of a key is the wanted one, or a name that the user may choose."""
  return _CHOSEN_NAME.accepts(part) if wanted == "*" else part == wanted
