"""Tables of the published architectures: which tensor of a checkpoint fills which of our parameters."""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
  """One of our parameters and the tensor, or the tensors of all layers, that fill it.

  Attributes:
    ours: Path of the parameter, joined by `/`.
    theirs: Name of the tensor. If it contains `{layer}`, there is one tensor per layer, and the layers are stacked
      along the first dimension of the parameter.
    layout: `"theirs -> ours"` with one letter for each dimension of the parameter, except the layers. Parentheses group
      the dimensions that are one dimension of the tensor, as in `"(h k) d -> d h k"`. A 1 is a dimension of size one
      that the parameter does not have. Empty if tensor and parameter have the same layout.
    part: `(i, n)`: the tensor holds n of our parameters, one after another along its first dimension, and this is
      number i, from 0.
  """

  ours: str
  theirs: str
  layout: str = ""
  part: tuple[int, int] = (0, 1)

  @property
  def per_layer(self) -> bool:
    """Whether there is one tensor per layer."""
    return "{layer}" in self.theirs


@dataclasses.dataclass(frozen=True)
class Table:
  """Mapping from the checkpoints of one architecture to our parameters.

  Attributes:
    name: `model_type` in the `config.json` of Hugging Face.
    rules: One rule for each parameter.
    ignored: Regular expression of the names of tensors that are not used -> the reason.
    prefixes: Prefixes that the name of a tensor may have, such as that of a model within a larger one.
    renamed: Regular expression in a name of an older checkpoint -> its replacement.
  """

  name: str
  rules: tuple[Rule, ...]
  ignored: Mapping[str, str]
  prefixes: tuple[str, ...] = ()
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


_TO_HEADS = "(h k) d -> d h k"  # torch stores the matrix of a linear map as outputs x inputs.
_HEADS_BIAS = "(h k) -> h k"
_FROM_HEADS = "d (h k) -> h k d"
_SWAP = "o i -> i o"

_OLD_NORMS = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}


def _affine(ours: str, theirs: str, kernel: str, bias: str = "") -> tuple[Rule, Rule]:
  return (Rule(f"{ours}/kernel", f"{theirs}.weight", kernel), Rule(f"{ours}/bias", f"{theirs}.bias", bias))


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
  return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


BERT = Table(
  name="bert",
  rules=(
    Rule("word_embedding", "embeddings.word_embeddings.weight"),
    Rule("position_embedding", "embeddings.position_embeddings.weight"),
    Rule("token_type_embedding", "embeddings.token_type_embeddings.weight"),
    *_norm("embedding_norm", "embeddings.LayerNorm"),
    *_affine("layers/attention/query", "encoder.layer.{layer}.attention.self.query", _TO_HEADS, _HEADS_BIAS),
    *_affine("layers/attention/key", "encoder.layer.{layer}.attention.self.key", _TO_HEADS, _HEADS_BIAS),
    *_affine("layers/attention/value", "encoder.layer.{layer}.attention.self.value", _TO_HEADS, _HEADS_BIAS),
    *_affine("layers/attention/output", "encoder.layer.{layer}.attention.output.dense", _FROM_HEADS),
    *_norm("layers/attention_norm", "encoder.layer.{layer}.attention.output.LayerNorm"),
    *_affine("layers/up", "encoder.layer.{layer}.intermediate.dense", _SWAP),
    *_affine("layers/down", "encoder.layer.{layer}.output.dense", _SWAP),
    *_norm("layers/mlp_norm", "encoder.layer.{layer}.output.LayerNorm"),
  ),
  ignored={
    r"pooler\..*": "maps the first token, for sentence pairs; we use the mean of all tokens",
    r"embeddings\.position_ids": "a constant, 0 1 2 ...",
    r"cls\..*": "heads of pretraining",
    r"(classifier|qa_outputs)\..*": "heads of other tasks",
  },
  prefixes=("bert.",),
  renamed=_OLD_NORMS,
)

DISTILBERT = Table(
  name="distilbert",
  rules=(
    Rule("word_embedding", "embeddings.word_embeddings.weight"),
    Rule("position_embedding", "embeddings.position_embeddings.weight"),
    *_norm("embedding_norm", "embeddings.LayerNorm"),
    *_affine("layers/attention/query", "transformer.layer.{layer}.attention.q_lin", _TO_HEADS, _HEADS_BIAS),
    *_affine("layers/attention/key", "transformer.layer.{layer}.attention.k_lin", _TO_HEADS, _HEADS_BIAS),
    *_affine("layers/attention/value", "transformer.layer.{layer}.attention.v_lin", _TO_HEADS, _HEADS_BIAS),
    *_affine("layers/attention/output", "transformer.layer.{layer}.attention.out_lin", _FROM_HEADS),
    *_norm("layers/attention_norm", "transformer.layer.{layer}.sa_layer_norm"),
    *_affine("layers/up", "transformer.layer.{layer}.ffn.lin1", _SWAP),
    *_affine("layers/down", "transformer.layer.{layer}.ffn.lin2", _SWAP),
    *_norm("layers/mlp_norm", "transformer.layer.{layer}.output_layer_norm"),
  ),
  ignored={
    r"embeddings\.position_ids": "a constant, 0 1 2 ...",
    r"vocab_(transform|layer_norm|projector)\..*": "the head of pretraining",
    r"(pre_classifier|classifier|qa_outputs)\..*": "heads of other tasks",
  },
  prefixes=("distilbert.",),
  renamed=_OLD_NORMS,
)


# Prefixes of a decoder within a model with a head, and within a model with an image tower: transformers 4 puts
# "language_model." first, and transformers 5 "model.".
TEXT_PREFIXES = ("model.", "language_model.", "model.")


def _decoder(name: str, qkv_bias: bool = False, qk_norm: bool = False, output_norm: bool = False) -> Table:
  """Returns the table of a family with the structure of Llama. With `output_norm`, a layer has four norms."""
  layer = "layers.{layer}"
  biases = (
    Rule("layers/attention/query/bias", f"{layer}.self_attn.q_proj.bias", _HEADS_BIAS),
    Rule("layers/attention/key/bias", f"{layer}.self_attn.k_proj.bias", _HEADS_BIAS),
    Rule("layers/attention/value/bias", f"{layer}.self_attn.v_proj.bias", _HEADS_BIAS),
  )
  head_norms = (
    Rule("layers/attention/query_norm/scale", f"{layer}.self_attn.q_norm.weight"),
    Rule("layers/attention/key_norm/scale", f"{layer}.self_attn.k_norm.weight"),
  )
  norms = {"mlp_norm": "post_attention_layernorm"}
  if output_norm:
    norms = {
      "attention_output_norm": "post_attention_layernorm",
      "mlp_norm": "pre_feedforward_layernorm",
      "mlp_output_norm": "post_feedforward_layernorm",
    }
  return Table(
    name=name,
    rules=(
      Rule("word_embedding", "embed_tokens.weight"),
      Rule("layers/attention_norm/scale", f"{layer}.input_layernorm.weight"),
      Rule("layers/attention/query/kernel", f"{layer}.self_attn.q_proj.weight", _TO_HEADS),
      Rule("layers/attention/key/kernel", f"{layer}.self_attn.k_proj.weight", _TO_HEADS),
      Rule("layers/attention/value/kernel", f"{layer}.self_attn.v_proj.weight", _TO_HEADS),
      Rule("layers/attention/output/kernel", f"{layer}.self_attn.o_proj.weight", _FROM_HEADS),
      *(biases if qkv_bias else ()),
      *(head_norms if qk_norm else ()),
      *(Rule(f"layers/{ours}/scale", f"{layer}.{theirs}.weight") for ours, theirs in norms.items()),
      Rule("layers/gate/kernel", f"{layer}.mlp.gate_proj.weight", _SWAP),
      Rule("layers/up/kernel", f"{layer}.mlp.up_proj.weight", _SWAP),
      Rule("layers/down/kernel", f"{layer}.mlp.down_proj.weight", _SWAP),
      Rule("final_norm/scale", "norm.weight"),
    ),
    ignored={
      r"lm_head\.weight": "predicts tokens; we use the hidden states",
      r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "determined by the config",
      r"(vision_tower|multi_modal_projector)\..*": "the image tower of the larger models of Gemma 3",
    },
    prefixes=TEXT_PREFIXES,
  )


QWEN2 = _decoder("qwen2", qkv_bias=True)
QWEN3 = _decoder("qwen3", qk_norm=True)
LLAMA = _decoder("llama")
GEMMA3 = _decoder("gemma3_text", qk_norm=True, output_norm=True)

TABLES = {table.name: table for table in (BERT, DISTILBERT, QWEN2, QWEN3, LLAMA, GEMMA3)}


def _fused(ours: str, theirs: str) -> tuple[Rule, ...]:
  """Returns the rules of query, key and value of a `torch.nn.MultiheadAttention`, which stores them in one tensor."""
  return tuple(
    rule
    for i, name in enumerate(("query", "key", "value"))
    for rule in (
      Rule(f"{ours}/{name}/kernel", f"{theirs}.in_proj_weight", _TO_HEADS, (i, 3)),
      Rule(f"{ours}/{name}/bias", f"{theirs}.in_proj_bias", _HEADS_BIAS, (i, 3)),
    )
  )


# SigLIP and CLIP have the same layers, under the same names.
_CLIP_LAYERS = (
  *_norm("layers/attention_norm", "vision_model.encoder.layers.{layer}.layer_norm1"),
  *_affine("layers/attention/query", "vision_model.encoder.layers.{layer}.self_attn.q_proj", _TO_HEADS, _HEADS_BIAS),
  *_affine("layers/attention/key", "vision_model.encoder.layers.{layer}.self_attn.k_proj", _TO_HEADS, _HEADS_BIAS),
  *_affine("layers/attention/value", "vision_model.encoder.layers.{layer}.self_attn.v_proj", _TO_HEADS, _HEADS_BIAS),
  *_affine("layers/attention/output", "vision_model.encoder.layers.{layer}.self_attn.out_proj", _FROM_HEADS),
  *_norm("layers/mlp_norm", "vision_model.encoder.layers.{layer}.layer_norm2"),
  *_affine("layers/up", "vision_model.encoder.layers.{layer}.mlp.fc1", _SWAP),
  *_affine("layers/down", "vision_model.encoder.layers.{layer}.mlp.fc2", _SWAP),
)
_CLIP_IGNORED = {
  r"text_model\..*": "the text tower",
  r"vision_model\.embeddings\.position_ids": "a constant, 0 1 2 ...",
  r"classifier\..*": "heads of other tasks",
}
# transformers 5 saves a tower alone without the prefix that it has in the whole model.
_CLIP_RENAMED = {r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)": "vision_model."}
_PATCHES = "d c y x -> y x c d"

# The vision tower of SigLIP and of the fixed resolutions of SigLIP 2, which have the same classes in transformers.
SIGLIP = Table(
  name="siglip_vision_model",
  rules=(
    *_affine("patch_embedding", "vision_model.embeddings.patch_embedding", _PATCHES),
    Rule("position_embedding", "vision_model.embeddings.position_embedding.weight"),
    *_CLIP_LAYERS,
    *_norm("final_norm", "vision_model.post_layernorm"),
    Rule("head/probe", "vision_model.head.probe", "1 1 d -> d"),
    *_fused("head/attention", "vision_model.head.attention"),
    *_affine("head/attention/output", "vision_model.head.attention.out_proj", _FROM_HEADS),
    *_norm("head/mlp_norm", "vision_model.head.layernorm"),
    *_affine("head/up", "vision_model.head.mlp.fc1", _SWAP),
    *_affine("head/down", "vision_model.head.mlp.fc2", _SWAP),
  ),
  ignored=_CLIP_IGNORED | {r"logit_(scale|bias)": "parameters of the loss between the towers"},
  renamed=_CLIP_RENAMED,
)


PROJECTION = "visual_projection.weight"
"""Tensor that CLIP has if its features are mapped to the space of texts and images."""


def clip(projection: bool) -> Table:
  """Returns the table of the vision tower of CLIP, with or without `PROJECTION`."""
  return Table(
    name="clip_vision_model",
    rules=(
      Rule("patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", _PATCHES),
      Rule("class_token", "vision_model.embeddings.class_embedding"),
      Rule("position_embedding", "vision_model.embeddings.position_embedding.weight"),
      *_norm("embedding_norm", "vision_model.pre_layrnorm"),  # transformers spells it like this.
      *_CLIP_LAYERS,
      *_norm("final_norm", "vision_model.post_layernorm"),
      *((Rule("projection/kernel", PROJECTION, _SWAP),) if projection else ()),
    ),
    ignored=_CLIP_IGNORED
    | {
      r"text_projection\.weight": "a part of the text tower",
      r"logit_scale": "a parameter of the loss between the towers",
    },
    renamed=_CLIP_RENAMED,
  )


def dinov2(registers: bool, gated: bool) -> Table:
  """Returns the table of DINOv2.

  Args:
    registers: Whether the model has registers.
    gated: Whether its feed-forward networks are SwiGLU, as in the largest model.
  """
  layer = "encoder.layer.{layer}"
  wide = (  # One tensor has both maps, the gate first.
    Rule("layers/gate/kernel", f"{layer}.mlp.weights_in.weight", _SWAP, (0, 2)),
    Rule("layers/gate/bias", f"{layer}.mlp.weights_in.bias", "", (0, 2)),
    Rule("layers/up/kernel", f"{layer}.mlp.weights_in.weight", _SWAP, (1, 2)),
    Rule("layers/up/bias", f"{layer}.mlp.weights_in.bias", "", (1, 2)),
  )
  return Table(
    name="dinov2_with_registers" if registers else "dinov2",
    rules=(
      *_affine("patch_embedding", "embeddings.patch_embeddings.projection", _PATCHES),
      Rule("class_token", "embeddings.cls_token", "1 1 d -> d"),
      *((Rule("registers", "embeddings.register_tokens", "1 r d -> r d"),) if registers else ()),
      Rule("position_embedding", "embeddings.position_embeddings", "1 t d -> t d"),
      *_norm("layers/attention_norm", f"{layer}.norm1"),
      *_affine("layers/attention/query", f"{layer}.attention.attention.query", _TO_HEADS, _HEADS_BIAS),
      *_affine("layers/attention/key", f"{layer}.attention.attention.key", _TO_HEADS, _HEADS_BIAS),
      *_affine("layers/attention/value", f"{layer}.attention.attention.value", _TO_HEADS, _HEADS_BIAS),
      *_affine("layers/attention/output", f"{layer}.attention.output.dense", _FROM_HEADS),
      Rule("layers/attention_scale", f"{layer}.layer_scale1.lambda1"),
      *_norm("layers/mlp_norm", f"{layer}.norm2"),
      *(wide if gated else _affine("layers/up", f"{layer}.mlp.fc1", _SWAP)),
      *_affine("layers/down", f"{layer}.mlp.{'weights_out' if gated else 'fc2'}", _SWAP),
      Rule("layers/mlp_scale", f"{layer}.layer_scale2.lambda1"),
      *_norm("final_norm", "layernorm"),
    ),
    ignored={
      r"embeddings\.mask_token": "stands for a hidden patch in pretraining",  # nosec B105 - a token of an image.
      r"classifier\..*": "heads of other tasks",
    },
    prefixes=("dinov2.", "dinov2_with_registers."),
  )


def _dense(ours: str, theirs: str) -> tuple[Rule, Rule]:
  return Rule(f"{ours}/kernel", f"{theirs}/kernel"), Rule(f"{ours}/bias", f"{theirs}/bias")


def _flax_norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
  return Rule(f"{ours}/scale", f"{theirs}/scale"), Rule(f"{ours}/bias", f"{theirs}/bias")


def _flax_attention(ours: str, theirs: str) -> tuple[Rule, ...]:
  names = {"query": "query", "key": "key", "value": "value", "output": "out"}
  return tuple(rule for name, their in names.items() for rule in _dense(f"{ours}/{name}", f"{theirs}/{their}"))


def _big_vision(block: str) -> Table:
  """Returns the table of the image tower of big_vision's SigLIP, with `block` as the name of a layer."""
  return Table(
    name="big_vision SigLIP",
    rules=(
      *_dense("patch_embedding", "embedding"),
      Rule("position_embedding", "pos_embedding", "1 t d -> t d"),
      *_flax_norm("layers/attention_norm", f"{block}/LayerNorm_0"),
      *_flax_attention("layers/attention", f"{block}/MultiHeadDotProductAttention_0"),
      *_flax_norm("layers/mlp_norm", f"{block}/LayerNorm_1"),
      *_dense("layers/up", f"{block}/MlpBlock_0/Dense_0"),
      *_dense("layers/down", f"{block}/MlpBlock_0/Dense_1"),
      *_flax_norm("final_norm", "Transformer/encoder_norm"),
      Rule("head/probe", "MAPHead_0/probe", "1 1 d -> d"),
      *_flax_attention("head/attention", "MAPHead_0/MultiHeadDotProductAttention_0"),
      *_flax_norm("head/mlp_norm", "MAPHead_0/LayerNorm_0"),
      *_dense("head/up", "MAPHead_0/MlpBlock_0/Dense_0"),
      *_dense("head/down", "MAPHead_0/MlpBlock_0/Dense_1"),
    ),
    ignored={r"txt/.*": "the text tower", r"[tb]": "temperature and bias of the loss between the towers"},
    prefixes=("params/", "img/"),
  )


BIG_VISION_STACKED = _big_vision("Transformer/encoderblock")
BIG_VISION_UNSTACKED = _big_vision("Transformer/encoderblock_{layer}")
