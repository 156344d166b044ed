"""Tables, as data, of which tensor of a published checkpoint is which parameter of ours."""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
  """One parameter of ours and the tensor, or the tensor of every layer, that it comes from.

  Attributes:
    ours: path of the parameter, joined by `/`.
    theirs: name of the tensor; with `{layer}` in it, one tensor a layer, which stand in the
      parameter's leading dimension.
    layout: `"theirs -> ours"`, a letter for each of our dimensions (without the layers), brackets
      around those that are one dimension of theirs: `"(h k) d -> d h k"`. Empty if they are alike.
  """

  ours: str
  theirs: str
  layout: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
  """How the checkpoints of one architecture map to our parameters.

  Attributes:
    name: `model_type` in the `config.json` of Hugging Face.
    rules: one for each parameter.
    ignored: regular expressions of tensors that we have no use for, with the reason.
    prefixes: what may stand before a tensor's name (a model within a larger one).
    renamed: regular expressions of what older checkpoints say, with what they say today.
  """

  name: str
  rules: tuple[Rule, ...]
  ignored: Mapping[str, str]
  prefixes: tuple[str, ...] = ()
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


_TO_HEADS = "(h k) d -> d h k"  # torch keeps a linear map's matrix as outputs x inputs.
_HEADS_BIAS = "(h k) -> h k"
_FROM_HEADS = "d (h k) -> h k d"
_SWAP = "o i -> i o"

_OLD_NORMS = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}


def _affine(ours: str, theirs: str, kernel: str, bias: str = "") -> tuple[Rule, Rule]:
  return (
      Rule(f"{ours}/kernel", f"{theirs}.weight", kernel),
      Rule(f"{ours}/bias", f"{theirs}.bias", bias),
  )


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
  return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


BERT = Table(
    name="bert",
    rules=(
        Rule("word_embedding", "embeddings.word_embeddings.weight"),
        Rule("position_embedding", "embeddings.position_embeddings.weight"),
        Rule("token_type_embedding", "embeddings.token_type_embeddings.weight"),
        *_norm("embedding_norm", "embeddings.LayerNorm"),
        *_affine("layers/attention/query", "encoder.layer.{layer}.attention.self.query",
                 _TO_HEADS, _HEADS_BIAS),
        *_affine("layers/attention/key", "encoder.layer.{layer}.attention.self.key",
                 _TO_HEADS, _HEADS_BIAS),
        *_affine("layers/attention/value", "encoder.layer.{layer}.attention.self.value",
                 _TO_HEADS, _HEADS_BIAS),
        *_affine("layers/attention/output", "encoder.layer.{layer}.attention.output.dense",
                 _FROM_HEADS),
        *_norm("layers/attention_norm", "encoder.layer.{layer}.attention.output.LayerNorm"),
        *_affine("layers/up", "encoder.layer.{layer}.intermediate.dense", _SWAP),
        *_affine("layers/down", "encoder.layer.{layer}.output.dense", _SWAP),
        *_norm("layers/mlp_norm", "encoder.layer.{layer}.output.LayerNorm"),
    ),
    ignored={
        r"pooler\..*": "maps the first token for sentence pairs; we take the mean of all tokens",
        r"embeddings\.position_ids": "a constant, 0 1 2 ...",
        r"cls\..*": "heads of pre-training",
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
        *_affine("layers/attention/query", "transformer.layer.{layer}.attention.q_lin",
                 _TO_HEADS, _HEADS_BIAS),
        *_affine("layers/attention/key", "transformer.layer.{layer}.attention.k_lin",
                 _TO_HEADS, _HEADS_BIAS),
        *_affine("layers/attention/value", "transformer.layer.{layer}.attention.v_lin",
                 _TO_HEADS, _HEADS_BIAS),
        *_affine("layers/attention/output", "transformer.layer.{layer}.attention.out_lin",
                 _FROM_HEADS),
        *_norm("layers/attention_norm", "transformer.layer.{layer}.sa_layer_norm"),
        *_affine("layers/up", "transformer.layer.{layer}.ffn.lin1", _SWAP),
        *_affine("layers/down", "transformer.layer.{layer}.ffn.lin2", _SWAP),
        *_norm("layers/mlp_norm", "transformer.layer.{layer}.output_layer_norm"),
    ),
    ignored={
        r"embeddings\.position_ids": "a constant, 0 1 2 ...",
        r"vocab_(transform|layer_norm|projector)\..*": "the head of pre-training",
        r"(pre_classifier|classifier|qa_outputs)\..*": "heads of other tasks",
    },
    prefixes=("distilbert.",),
    renamed=_OLD_NORMS,
)

TABLES = {table.name: table for table in (BERT, DISTILBERT)}
