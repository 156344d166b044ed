"""Building blocks of the models: linear maps and their adapters, norms, dropout, attention in segments, stacks."""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vixml_jax import sharding
from vixml_jax.typing import Array, Float, Int, Key, Tree

Initializer = Callable[..., jax.Array]
normal_init = jax.nn.initializers.normal(0.02)
# What torch gives a linear layer: uniform within 1 / sqrt(fan_in).
fan_in_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_ADAPTERS = ("lora_a", "lora_b")


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


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
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
  pin = lambda rows: sharding.constrain(rows, "row", "position", "vector")

  def step(carry, inputs):
    layer_params, key = inputs
    y = pin(apply(merge_params(graphdef, layer_params), pin(carry), key))
    return y, (y if return_layers else None)

  if remat:
    step = jax.checkpoint(step, prevent_cse=False)  # scan already keeps the two passes apart.
  return lax.scan(step, x, (params, keys))


def split_key(key: jax.Array | None, num: int) -> Any:
  """`jax.random.split`, or `num` times None when there is no key."""
  return [None] * num if key is None else jax.random.split(key, num)


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
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
  """Layer normalization over the last dimension, computed in f32, returned in the input's dtype."""

  def __init__(self, size: int, epsilon: float):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((size,)), axes=("embed",))
    self.bias = nnx.Param(jnp.zeros((size,)), axes=("embed",))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalizes over D."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Division by the root mean square over the last dimension, in f32, returned in the input's dtype.

  Args:
    size: of the last dimension.
    epsilon: added to the mean square.
    axis: name of the last dimension.
    param_dtype: of the scale.
  """

  def __init__(self, size: int, epsilon: float, axis: str = "embed", param_dtype: str = "float32"):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((size,), param_dtype), axes=(axis,))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalizes over D."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
  """Affine map of the last dimensions `inputs` of an array to the dimensions `outputs`.

  With an adapter (LoRA) the map is x W + b + alpha / sqrt(r) (x A) B. B starts at zero, so that the adapter
  changes nothing at first; A starts as torch starts a linear layer, like PEFT's.

  Args:
    inputs: for each dimension that is summed over, its axis name and size.
    outputs: for each dimension that comes out, its axis name and size.
    bias: whether there is b.
    dtype: of the computation.
    param_dtype: of W and b; A and B are f32.
    kernel_init: called with the kernel's shape as a matrix, so that fan-in and fan-out are right.
    lora_rank: r; 0 for no adapter.
    lora_alpha: alpha, positive where there is an adapter.
    rngs: source of the initial values.

  Reference: rank-stabilized LoRA (arXiv 2312.03732), section 3; `use_rslora` in PEFT.
  """

  def __init__(
    self,
    inputs: dict[str, int],
    outputs: dict[str, int],
    *,
    bias: bool = True,
    dtype: str = "float32",
    param_dtype: str = "float32",
    kernel_init: Initializer = normal_init,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.num_inputs = len(inputs)
    input_sizes, output_sizes = tuple(inputs.values()), tuple(outputs.values())
    matrix = (math.prod(input_sizes), math.prod(output_sizes))
    kernel = kernel_init(rngs.params(), matrix, jnp.dtype(param_dtype)).reshape(input_sizes + output_sizes)
    self.kernel = nnx.Param(kernel, axes=(*inputs, *outputs))
    self.bias = nnx.Param(jnp.zeros(output_sizes, param_dtype), axes=tuple(outputs)) if bias else None
    if not lora_rank:
      self.lora_a = self.lora_b = None
      return
    self.lora_scale = lora_scale(lora_rank, lora_alpha)
    lora_a = fan_in_uniform(rngs.params(), (matrix[0], lora_rank), jnp.float32)
    rank_a, rank_b = ("lora" if "embed" in sizes else "lora_alone" for sizes in (inputs, outputs))
    self.lora_a = nnx.Param(lora_a.reshape(*input_sizes, lora_rank), axes=(*inputs, rank_a))
    self.lora_b = nnx.Param(jnp.zeros((lora_rank, *output_sizes)), axes=(rank_b, *outputs))

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """[..., *inputs] -> [..., *outputs]."""
    x = x.astype(self.dtype)
    y = jnp.tensordot(x, self.kernel[...].astype(self.dtype), axes=self.num_inputs)
    if self.lora_a is not None and self.lora_b is not None:
      # The scale goes on the narrow array between the two.
      narrow = self.lora_scale * jnp.tensordot(x, self.lora_a[...].astype(self.dtype), axes=self.num_inputs)
      y = y + jnp.tensordot(narrow, self.lora_b[...].astype(self.dtype), axes=1)
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def lora_scale(rank: int, alpha: float) -> float:
  """alpha / sqrt(rank): what multiplies the product of an adapter's matrices.

  Raises:
    ValueError: one of them is not positive.
  """
  if rank <= 0 or alpha <= 0:
    raise ValueError(f"an adapter of rank {rank} with alpha {alpha}: both must be positive")
  return alpha / math.sqrt(rank)


def split_lora(params: Tree) -> tuple[Tree, Tree]:
  """Takes the adapters out of a model's parameters, or of any nested dict with their keys.

  Returns:
    `(base, adapters)`: nested dicts without, and with nothing but, `lora_a` and `lora_b`.
  """
  base, adapters = {}, {}
  for name, value in params.items():
    if not isinstance(value, dict):
      (adapters if name in _ADAPTERS else base)[name] = value
      continue
    for tree, part in zip((base, adapters), split_lora(value), strict=True):
      if part:
        tree[name] = part
  return base, adapters


def join_params(left: Tree, right: Tree) -> Tree:
  """Puts together two nested dicts that share no leaf, such as `split_lora` returns."""
  joined = left | right
  for name in left.keys() & right.keys():
    joined[name] = join_params(left[name], right[name])
  return joined


def merge_lora(params: Tree, scale: float) -> Tree:
  """Adds adapters to the kernels that they adapt: the same map without adapters.

  Args:
    params: nested dict of arrays, in which `lora_a` and `lora_b` stand beside `kernel`; stacked layers too.
    scale: what `lora_scale` says.

  Returns:
    The nested dict without adapters; every kernel in its own dtype, its sum taken in f32.
  """
  merged = {name: merge_lora(value, scale) if isinstance(value, dict) else value for name, value in params.items()}
  if "lora_a" in merged:
    merged["kernel"] = _merge_kernel(merged["kernel"], merged.pop("lora_a"), merged.pop("lora_b"), scale)
  return merged


def _merge_kernel(kernel, lora_a, lora_b, scale):
  def merge(matrices):
    kernel, lora_a, lora_b = matrices
    update = jnp.tensordot(lora_a, lora_b, axes=1, precision=lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

  # inputs + outputs dimensions in the kernel, and both ranks besides in A and B; the rest are stacked layers.
  for _ in range(lora_a.ndim + lora_b.ndim - kernel.ndim - 2):
    merge = functools.partial(lax.map, merge)  # One layer's product at a time: f32 products of all would not fit.
  return merge((kernel, lora_a, lora_b))


def segment_attention(
  query: Float[Array, "R Q H head_dim"],
  key: Float[Array, "R T G head_dim"],
  value: Float[Array, "R T G head_dim"],
  segments: Int[Array, "R T"] | None,
  dropout_rate: float = 0.0,
  dropout_key: Key[Array, ""] | None = None,
  causal: bool = False,
) -> Float[Array, "R Q H head_dim"]:
  """Scaled dot-product attention in which a token sees the tokens of its own segment only.

  Padding (segment 0) sees padding, so that its rows stay finite; no text sees it.

  Args:
    query: [R, Q, H, head_dim], H heads; Q is T wherever there are segments.
    key: [R, T, G, head_dim]; each of the G heads serves H / G neighboring heads of the queries.
    value: [R, T, G, head_dim].
    segments: int32 [R, T], 0 for padding; None lets every token of a row see the whole row.
    dropout_rate: of the attention probabilities.
    dropout_key: random key, None for none.
    causal: a token sees itself and what stands before it in the row, but nothing after it; Q is T.

  Returns:
    [R, Q, H, head_dim] in the dtype of `value`. The softmax is taken in f32.
  """
  rows, length, num_heads, head_dim = query.shape
  groups = key.shape[2]
  # The ellipsis is a group's heads; where each has its key to itself, a dimension of one would only cost copies.
  group = (num_heads // groups,) if num_heads > groups else ()
  grouped = (query * (1.0 / math.sqrt(head_dim))).reshape(rows, length, groups, *group, head_dim)
  logits = jnp.einsum("rqg...d,rkgd->rg...qk", grouped, key, preferred_element_type=jnp.float32)
  logits = logits.reshape(rows, num_heads, length, -1)
  if segments is not None:
    same = segments[:, None, :, None] == segments[:, None, None, :]
    logits = jnp.where(same, logits, np.finfo(np.float32).min)
  if causal:
    earlier = np.tri(length, dtype=bool)
    logits = jnp.where(earlier, logits, np.finfo(np.float32).min)
  weights = jax.nn.softmax(logits, axis=-1)
  weights = dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
  weights = weights.reshape(rows, groups, *group, length, -1)
  return jnp.einsum("rg...qk,rkgd->rqg...d", weights, value).reshape(query.shape)


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
  sums = jnp.einsum("rst,rtd->rsd", members, hidden.astype(jnp.float32), precision=lax.Precision.HIGHEST)
  return sums / jnp.maximum(members.sum(-1, keepdims=True), 1.0)


def last_places(segments: Int[Array, "R T"]) -> Int[Array, "R T"]:
  """The segments' last places alone: `pool_segments` of these is last-token pooling.

  Args:
    segments: int32 [R, T], slots 1..S, each in one piece; 0 for padding.

  Returns:
    int32 [R, T], 0 in all other places.
  """
  following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
  return jnp.where(segments != following, segments, 0)


class Attention(nnx.Module):
  """Multi-head self-attention within segments, with biases.

  Args:
    embed_dim: D.
    num_heads: H, a divisor of D.
    dropout: rate on the attention probabilities.
    dtype: of the computation.
    kernel_init: initializer of the four kernels, seen as D x D matrices.
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
    self, x: Float[Array, "R T D"], segments: Int[Array, "R T"] | None, key: Key[Array, ""] | None = None
  ) -> Float[Array, "R T D"]:
    """[R, T, D] -> [R, T, D]; `segments` as in `segment_attention`."""
    mixed = segment_attention(self.query(x), self.key(x), self.value(x), segments, self.dropout, key)
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
    kernel_init: initializer of the kernels, seen as matrices.
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
    self, x: Float[Array, "R T D"], segments: Int[Array, "R T"] | None, key: Key[Array, ""] | None = None
  ) -> Float[Array, "R T D"]:
    """[R, T, D] -> [R, T, D]; `segments` as in `segment_attention`, key None for no dropout."""
    attention_key, projection_key, activation_key, output_key = split_key(key, 4)
    y = self.attention(x, segments, attention_key)
    x = self.attention_norm(x + dropout(y, self.projection_dropout, projection_key))
    y = dropout(gelu(self.up(x)), self.activation_dropout, activation_key)
    y = dropout(self.down(y), self.dropout, output_key)
    return self.mlp_norm(x + y)
