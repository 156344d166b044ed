"""Building blocks of the models: linear maps, norms, dropout, attention within segments, stacks."""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vixml_jax.typing import Array, Float, Int, Key

Initializer = Callable[..., jax.Array]
normal_init = jax.nn.initializers.normal(0.02)
# What torch gives a linear layer: uniform within 1 / sqrt(fan_in).
fan_in_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def split_params(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
  """Takes a module apart into its structure, its parameters and their logical axes.

  Args:
    module: a module whose variables are all `nnx.Param(value, axes=...)`. The values may be
      arrays, tracers or `jax.ShapeDtypeStruct` (of `nnx.eval_shape`).

  Returns:
    `(graphdef, params, axes)`: what `merge_params` needs, a nested dict of arrays, and a nested
    dict with the same keys that holds, for every array, one axis name for each dimension.

  Raises:
    ValueError: a variable is not a Param, or its axes do not match its dimensions.
  """
  graphdef, state = nnx.split(module)
  params, axes = {}, {}
  for path, variable in nnx.to_flat_state(state):
    name = "/".join(map(str, path))
    if not isinstance(variable, nnx.Param):
      raise ValueError(f"{name} is a {type(variable).__name__}; models hold nnx.Param only")
    value = variable.get_value()
    names = variable.get_metadata().get("axes")
    if names is None or len(names) != len(value.shape):
      raise ValueError(f"{name} has shape {value.shape} and axes {names}: one name a dimension")
    _set_nested(params, path, value)
    _set_nested(axes, path, tuple(names))
  return graphdef, params, axes


def _set_nested(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
  for part in path[:-1]:
    tree = tree.setdefault(part, {})
  tree[path[-1]] = value


def merge_params(graphdef: nnx.GraphDef, params: dict[str, Any]) -> Any:
  """Puts together what `split_params` took apart; for use inside jit."""
  return nnx.merge(graphdef, params)


def stack_layers(
    make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs
) -> nnx.Module:
  """One module that holds `num_layers` layers, each parameter with a leading axis `layers`.

  Args:
    make_layer: builds one layer; called once, under vmap.
    num_layers: how many layers to stack.
    rngs: source of the initial values; every layer draws its own.
  """
  stack = nnx.vmap(make_layer)(rngs.split(num_layers))
  for _, param in nnx.to_flat_state(nnx.state(stack, nnx.Param)):
    param.set_metadata(axes=("layers", *param.get_metadata()["axes"]))
  return stack


def scan_layers(
    stack: nnx.Module,
    x: jax.Array,
    apply: Callable[[Any, jax.Array, jax.Array | None], jax.Array],
    keys: jax.Array | None = None,
    remat: bool = False,
    return_layers: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs stacked layers one after the other under `lax.scan`.

  Args:
    stack: what `stack_layers` made.
    x: input of the first layer.
    apply: `apply(layer, x, key) -> x`, one layer.
    keys: one random key a layer, or None for a deterministic run.
    remat: recompute each layer's activations in the backward pass instead of keeping them.
    return_layers: also return the output of every layer.

  Returns:
    The last layer's output, and all outputs stacked in front (None unless asked for).
  """
  graphdef, params, _ = split_params(stack)

  def step(carry, inputs):
    layer_params, key = inputs
    y = apply(merge_params(graphdef, layer_params), carry, key)
    return y, (y if return_layers else None)

  if remat:
    step = jax.checkpoint(step, prevent_cse=False)  # scan already keeps the two passes apart.
  return lax.scan(step, x, (params, keys))


def split_key(key: jax.Array | None, num: int) -> Any:
  """`jax.random.split`, or `num` times None when there is no key."""
  return [None] * num if key is None else jax.random.split(key, num)


def dropout(
    x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "..."]:
  """Zeroes each element with probability `rate` and scales the others so the mean stays.

  The probability is rounded to a multiple of 1/256 and the scale is that of the rounded value:
  one random byte an element costs a quarter of what a random float does, and random bits are
  the better part of dropout's cost on a CPU.

  Args:
    x: any shape of one dimension or more.
    rate: probability of zero, `0 <= rate < 1`.
    key: random key of any implementation; None returns `x` as it is.

  Raises:
    ValueError: the rate is out of range, or so small that it would round to none.
  """
  threshold = round(rate * 256)
  if not 0 <= rate < 1 or threshold == 256 or (threshold == 0 and rate > 0):
    raise ValueError(f"dropout rate {rate} is neither 0 nor between 1/512 and 511/512")
  if key is None or threshold == 0:
    return x
  *leading, size = x.shape
  words = jax.random.bits(key, (*leading, -(-size // 4)), jnp.uint32)
  bits = lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, -1)[..., :size]
  return jnp.where(bits >= threshold, x * (256 / (256 - threshold)), jnp.zeros((), x.dtype))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """GELU in its exact form, `x * Phi(x)`; with erf, which is cheaper than erfc on every backend."""
  return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


class LayerNorm(nnx.Module):
  """Layer normalisation over the last dimension, computed in f32, returned in the input's dtype."""

  def __init__(self, size: int, epsilon: float):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((size,)), axes=("embed",))
    self.bias = nnx.Param(jnp.zeros((size,)), axes=("embed",))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalises over D."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
  """Affine map of the last dimensions `inputs` of an array to the dimensions `outputs`.

  Args:
    inputs: for each dimension that is summed over, its axis name and size.
    outputs: for each dimension that comes out, its axis name and size.
    dtype: of the computation; parameters are f32.
    kernel_init: called with the kernel's shape as a matrix, so that fan-in and fan-out are right.
    rngs: source of the initial kernel.
  """

  def __init__(
      self,
      inputs: dict[str, int],
      outputs: dict[str, int],
      *,
      dtype: str = "float32",
      kernel_init: Initializer = normal_init,
      rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.num_inputs = len(inputs)
    sizes = (*inputs.values(), *outputs.values())
    matrix = (math.prod(inputs.values()), math.prod(outputs.values()))
    kernel = kernel_init(rngs.params(), matrix, jnp.float32).reshape(sizes)
    self.kernel = nnx.Param(kernel, axes=(*inputs, *outputs))
    self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), axes=tuple(outputs))

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """[..., *inputs] -> [..., *outputs]."""
    kernel = self.kernel[...].astype(self.dtype)
    y = jnp.tensordot(x.astype(self.dtype), kernel, axes=self.num_inputs)
    return y + self.bias[...].astype(self.dtype)


def segment_attention(
    query: Float[Array, "R Q H head_dim"],
    key: Float[Array, "R T H head_dim"],
    value: Float[Array, "R T H head_dim"],
    segments: Int[Array, "R T"] | None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "R Q H head_dim"]:
  """Scaled dot-product attention in which a token sees the tokens of its own segment only.

  Padding (segment 0) sees padding, so that its rows stay finite; no text sees it.

  Args:
    query: [R, Q, H, head_dim], H heads; Q is T wherever there are segments.
    key: [R, T, H, head_dim].
    value: [R, T, H, head_dim].
    segments: int32 [R, T], 0 for padding; None lets every token of a row see the whole row.
    dropout_rate: of the attention probabilities.
    dropout_key: random key, None for none.

  Returns:
    [R, Q, H, head_dim] in the dtype of `value`. The softmax is taken in f32.
  """
  scale = 1.0 / math.sqrt(query.shape[-1])
  logits = jnp.einsum(
      "rqhd,rkhd->rhqk", query * scale, key, preferred_element_type=jnp.float32
  )
  if segments is not None:
    same = segments[:, None, :, None] == segments[:, None, None, :]
    logits = jnp.where(same, logits, np.finfo(np.float32).min)
  weights = jax.nn.softmax(logits, axis=-1)
  weights = dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
  return jnp.einsum("rhqk,rkhd->rqhd", weights, value)


def pool_segments(
    hidden: Float[Array, "R T D"], segments: Int[Array, "R T"], num_segments: int
) -> Float[Array, "R S D"]:
  """Mean over the tokens of each segment: sentence embeddings before the norm.

  Args:
    hidden: [R, T, D].
    segments: int32 [R, T], slots 1..S, 0 for padding.
    num_segments: S.

  Returns:
    f32 [R, S, D]; slot s + 1 at index s, zeros for a slot without tokens.
  """
  slots = jnp.arange(1, num_segments + 1, dtype=segments.dtype)
  members = (segments[:, None, :] == slots[:, None]).astype(jnp.float32)  # [R, S, T]
  sums = jnp.einsum(
      "rst,rtd->rsd", members, hidden.astype(jnp.float32), precision=lax.Precision.HIGHEST
  )
  return sums / jnp.maximum(members.sum(-1, keepdims=True), 1.0)


class Attention(nnx.Module):
  """Multi-head self-attention within segments, with biases.

  Args:
    embed_dim: D.
    num_heads: H, a divisor of D.
    dropout: rate on the attention probabilities.
    dtype: of the computation.
    kernel_init: initialiser of the four kernels, seen as D x D matrices.
    rngs: source of the initial values.
  """

  def __init__(
      self,
      embed_dim: int,
      num_heads: int,
      *,
      dropout: float = 0.0,
      dtype: str = "float32",
      kernel_init: Initializer = normal_init,
      rngs: nnx.Rngs,
  ):
    if embed_dim % num_heads:
      raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
    self.dropout = dropout
    embed = {"embed": embed_dim}
    heads = {"heads": num_heads, "head_dim": embed_dim // num_heads}
    options: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init, "rngs": rngs}
    self.query = Linear(embed, heads, **options)
    self.key = Linear(embed, heads, **options)
    self.value = Linear(embed, heads, **options)
    self.output = Linear(heads, embed, **options)

  def __call__(
      self,
      x: Float[Array, "R T D"],
      segments: Int[Array, "R T"] | None,
      key: Key[Array, ""] | None = None,
  ) -> Float[Array, "R T D"]:
    """[R, T, D] -> [R, T, D]; `segments` as in `segment_attention`."""
    mixed = segment_attention(
        self.query(x), self.key(x), self.value(x), segments, self.dropout, key
    )
    return self.output(mixed)

  def cross(self, x: Float[Array, "R Q D"], context: Float[Array, "R T D"]) -> Float[Array, "R Q D"]:
    """Attention of Q vectors to the T vectors of a row, without dropout."""
    mixed = segment_attention(self.query(x), self.key(context), self.value(context), None)
    return self.output(mixed)


class PostNormLayer(nnx.Module):
  """Transformer encoder layer with the norms after the residual sums, as in BERT.

  Args:
    embed_dim: D.
    num_heads: H, a divisor of D.
    mlp_dim: width of the feed-forward part.
    dropout: rate on the output of the feed-forward part.
    attention_dropout: rate on the attention probabilities.
    projection_dropout: rate on the output of the attention (DistilBERT has none).
    activation_dropout: rate inside the feed-forward part (BERT and DistilBERT have none).
    layer_norm_eps: added to the variance.
    dtype: of the computation; norms and softmax are f32 in any case.
    kernel_init: initialiser of the kernels, seen as matrices.
    rngs: source of the initial values.
  """

  def __init__(
      self,
      embed_dim: int,
      num_heads: int,
      mlp_dim: int,
      *,
      dropout: float = 0.1,
      attention_dropout: float = 0.1,
      projection_dropout: float = 0.1,
      activation_dropout: float = 0.0,
      layer_norm_eps: float = 1e-12,
      dtype: str = "float32",
      kernel_init: Initializer = normal_init,
      rngs: nnx.Rngs,
  ):
    self.dropout = dropout
    self.projection_dropout = projection_dropout
    self.activation_dropout = activation_dropout
    options: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init, "rngs": rngs}
    self.attention = Attention(embed_dim, num_heads, dropout=attention_dropout, **options)
    self.attention_norm = LayerNorm(embed_dim, layer_norm_eps)
    self.up = Linear({"embed": embed_dim}, {"mlp": mlp_dim}, **options)
    self.down = Linear({"mlp": mlp_dim}, {"embed": embed_dim}, **options)
    self.mlp_norm = LayerNorm(embed_dim, layer_norm_eps)

  def __call__(
      self,
      x: Float[Array, "R T D"],
      segments: Int[Array, "R T"] | None,
      key: Key[Array, ""] | None = None,
  ) -> Float[Array, "R T D"]:
    """[R, T, D] -> [R, T, D]; `segments` as in `segment_attention`, key None for no dropout."""
    attention_key, projection_key, activation_key, output_key = split_key(key, 4)
    y = self.attention(x, segments, attention_key)
    x = self.attention_norm(x + dropout(y, self.projection_dropout, projection_key))
    y = dropout(gelu(self.up(x)), self.activation_dropout, activation_key)
    y = dropout(self.down(y), self.dropout, output_key)
    return self.mlp_norm(x + y)
