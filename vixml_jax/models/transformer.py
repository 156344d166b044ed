"""The post-norm transformer layer, and stacks of equal layers, which run as a loop or are unrolled."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vixml_jax import sharding
from vixml_jax.models import layers
from vixml_jax.models.attention import Attention
from vixml_jax.models.attention_call import REFERENCE
from vixml_jax.models.chunks import map_chunks_recomputed
from vixml_jax.models.parameters import merge_params, split_params
from vixml_jax.typing import Array, Float, Int, Key, Tree

# Activations of a layer that can be stored although the layer is recomputed: the outputs of its projections, and the
# attention's output before its projection. Only a gated feed-forward network has a "gate".
SAVED_NAMES = ("query", "key", "value", "attention", "gate", "up")

# Stacks of more layers than this always run as a loop, because the time to compile unrolled layers grows with them.
_MOST_UNROLLED = 12


class PostNormLayer(nnx.Module):
  """Transformer encoder layer that normalizes after each residual sum, as in BERT.

  Args:
    embed_dim: D.
    num_heads: Number of heads H, a divisor of D.
    mlp_dim: Width of the feed-forward network.
    dropout: Dropout rate of the output of the feed-forward network.
    attention_dropout: Dropout rate of the attention probabilities.
    projection_dropout: Dropout rate of the output of the attention; 0 in DistilBERT.
    activation_dropout: Dropout rate inside the feed-forward network; 0 in BERT and DistilBERT.
    layer_norm_eps: Added to the variance in both norms.
    dtype: Dtype of the computation. Norms and softmax are always computed in float32.
    init: Initial values: "bert" for normal kernels with a standard deviation of 0.02 and zero biases; "fan_in" for
      kernels uniform within 1 / sqrt(fan_in) and zero biases; "torch" for those of torch.nn.TransformerEncoderLayer.
    attention: Implementation of the attention; see `attention.segment_attention`.
    rngs: Source of the initial values.
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
    init: str = "bert",
    attention: str = REFERENCE,
    rngs: nnx.Rngs,
  ):
    self.dropout = dropout
    self.projection_dropout = projection_dropout
    self.activation_dropout = activation_dropout
    kernel_init = layers.normal_init if init == "bert" else layers.fan_in_uniform
    self.attention = Attention(
      embed_dim,
      num_heads,
      dropout=attention_dropout,
      dtype=dtype,
      kernel_init=layers.stacked_xavier_uniform if init == "torch" else kernel_init,
      output_init=kernel_init,
      implementation=attention,
      rngs=rngs,
    )
    self.attention_norm = layers.LayerNorm(embed_dim, layer_norm_eps)
    uniform_bias = init == "torch"
    options: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init, "uniform_bias": uniform_bias, "rngs": rngs}
    self.up = layers.Linear({"embed": embed_dim}, {"mlp": mlp_dim}, **options)
    self.down = layers.Linear({"mlp": mlp_dim}, {"embed": embed_dim}, **options)
    self.mlp_norm = layers.LayerNorm(embed_dim, layer_norm_eps)

  def __call__(
    self, x: Float[Array, "R T D"], segments: Int[Array, "R T"] | None, key: Key[Array, ""] | None = None
  ) -> Float[Array, "R T D"]:
    """Applies the layer.

    Args:
      x: Vectors [R, T, D].
      segments: As in `attention.segment_attention`.
      key: Random key of the dropout; None for no dropout.
    """
    attention_key, projection_key, activation_key, output_key = layers.split_key(key, 4)
    y = layers.dropout(self.attention(x, segments, attention_key), self.projection_dropout, projection_key)
    x = self.attention_norm(x + y.astype(x.dtype))
    y = layers.dropout(layers.gelu(checkpoint_name(self.up(x), "up")), self.activation_dropout, activation_key)
    y = layers.dropout(self.down(y), self.dropout, output_key)
    return self.mlp_norm(x + y.astype(x.dtype))


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
  """Returns one module that holds `num_layers` layers; each parameter has a leading axis `layers`.

  Args:
    make_layer: Function that builds one layer. It is called once, under vmap.
    num_layers: Number of layers.
    rngs: Source of the initial values. Each layer draws its own.
  """
  stack = nnx.vmap(make_layer)(rngs.split(num_layers))
  for _, param in nnx.to_flat_state(nnx.state(stack, nnx.Param)):
    param.set_metadata(axes=("layers", *param.get_metadata()["axes"]))
  return stack


def check_saved(names: Sequence[str]) -> tuple[str, ...]:
  """Returns the names of activations that are stored although layers are recomputed, as `saved` of `scan_layers`.

  Raises:
    ValueError: If a name is not in `SAVED_NAMES`.
  """
  for name in names:
    if name not in SAVED_NAMES:
      raise ValueError(f"remat_saved {name!r}: must be one of {', '.join(SAVED_NAMES)}")
  return tuple(names)


def is_unrolled(num_layers: int, remat: bool) -> bool:
  """Returns whether `scan_layers` puts that many layers into a program one after another instead of in a loop."""
  return num_layers <= _MOST_UNROLLED and not remat


def scan_layers(
  stack: nnx.Module,
  x: Array,
  apply: Callable[[Any, Array, Any, Array | None, Any], Array],
  context: Any = None,
  keys: Array | None = None,
  *,
  by_layer: Any = None,
  remat: bool = False,
  saved: tuple[str, ...] = (),
  return_layers: bool = False,
  filled: Array | None = None,
) -> tuple[Array, Any]:
  """Applies stacked layers one after another under `lax.scan`.

  Up to 12 layers are unrolled if nothing is recomputed. It saves memory traffic and costs time of compilation.

  With `filled`, the rows are in chunks. Each layer then runs over one chunk after another. The backward pass keeps the
  input of each layer, and recomputes a layer chunk by chunk, so that only the activations of one layer and one chunk
  are in memory. Every forward product is computed twice, as with `remat`. Empty chunks are skipped.

  Args:
    stack: Module that `stack_layers` returned.
    x: Input of the first layer, [R, T, D], or [chunks, R, T, D] with `filled`.
    apply: Function `apply(layer, x, context, key, own) -> x` that applies one layer to rows [R, T, D]. It must not
      close over traced values.
    context: Arrays that all layers get. With `filled`, their first dimension counts the chunks.
    keys: One random key per layer; None for a deterministic run. Each chunk gets a key of its own.
    by_layer: Arrays whose first dimension counts the layers. `own` is the part of a layer.
    remat: Whether to recompute each layer's activations in the backward pass instead of storing them.
    saved: Names (`SAVED_NAMES`) of activations that `remat` stores nevertheless. Ignored with `filled`.
    return_layers: Whether to also return the output of every layer.
    filled: Which chunks have any text, bool [chunks]; None if `x` has no dimension of chunks.

  Returns:
    The output of the last layer, and the outputs of all layers, stacked along a new first dimension (None unless
    `return_layers`). An empty chunk is zero.
  """
  graphdef, params, axes = split_params(stack)

  @sharding.in_current_mesh  # Chunks are recomputed after the caller has left its mesh.
  def run(layer: tuple[Tree, Any], inputs: tuple[Array, Any, Array | None]) -> Array:
    (layer_params, own), (rows, context, key) = layer, inputs
    return _constrain(apply(merge_params(graphdef, layer_params), _constrain(rows), context, key, own))

  def step(carry: Array, inputs: tuple[Tree, Array | None, Any]) -> tuple[Array, Array | None]:
    layer_params, key, own = inputs
    layer_params = jax.tree.map(lambda param, names: sharding.gather(param, *names[1:]), layer_params, axes)
    if filled is None:
      y = run((layer_params, own), (carry, context, key))
    else:
      chunk_keys = None if key is None else jax.random.split(key, len(filled))
      chunks = (_constrain(carry), context, chunk_keys)
      y = _constrain(map_chunks_recomputed(run, (layer_params, own), chunks, filled))
    return y, (y if return_layers else None)

  if remat or filled is not None:
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    step = jax.checkpoint(step, prevent_cse=False, policy=policy)  # Within scan, CSE cannot undo the recomputation.
    return lax.scan(step, x, (params, keys, by_layer))
  # Activations that a loop stores for the backward pass are copied into an array of all layers and out again.
  return lax.scan(step, x, (params, keys, by_layer), unroll=is_unrolled(len(jax.tree.leaves(params)[0]), remat))


def _constrain(x: Array) -> Array:
  """Shards [R, T, D], or [chunks, R, T, D], by rows."""
  return sharding.constrain(x, *("chunk",) * (x.ndim - 3), "row", "position", "vector")
