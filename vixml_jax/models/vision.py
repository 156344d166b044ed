"""Vision transformers that map pixels to one feature vector per image: the towers of SigLIP, CLIP and DINOv2."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.models import layers
from vixml_jax.models.attention import Attention
from vixml_jax.models.parameters import split_params
from vixml_jax.models.transformer import scan_layers, stack_layers
from vixml_jax.typing import Array, Float, Tree

_xavier = jax.nn.initializers.xavier_uniform()

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": layers.gelu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "silu": jax.nn.silu,
}


class VisionTransformer(nnx.Module):
  """Pre-norm vision transformer with learned positions.

  Patches do not overlap; pixels beyond the last whole patch, at the right and at the bottom, are ignored (6 of 384
  pixels for patches of 14). The defaults are those of SigLIP: no class token, and attention pooling.

  | | SigLIP | CLIP | DINOv2 |
  |---|---|---|---|
  | feature | attention pooling of all tokens | class token | class token |
  | `activation` | gelu_tanh | quick_gelu or gelu | gelu, or silu with `gated` |
  | further options | | `embedding_norm`, no `patch_bias`, `projection_dim` | `layer_scale`, `num_registers` |

  Args:
    image_size: Height and width of the images in pixels.
    patch_size: Height and width of a patch in pixels.
    num_layers: Number of layers.
    embed_dim: D, which is also the dimension F of the features unless there is a projection.
    num_heads: Number of attention heads, a divisor of D.
    mlp_dim: Width of the feed-forward networks.
    dtype: Dtype of the computation. Parameters, norms and softmax are float32.
    remat: Whether to recompute the activations of each layer in the backward pass.
    layer_norm_eps: Added to the variance in every norm.
    activation: Activation of the feed-forward networks, a key of `_ACTIVATIONS`.
    gated: Whether the activation of one linear map is multiplied by another one, as in SwiGLU.
    layer_scale: Whether the outputs of attention and feed-forward network are multiplied by a learned vector.
    patch_bias: Whether the map of the patches has a bias.
    class_token: Whether the feature is the output of a learned token, which is the first one. Otherwise the outputs of
      all tokens are pooled by attention.
    num_registers: Number of learned tokens after the class token. They have no position and are not used as features.
    embedding_norm: Whether the input of the first layer is normalized.
    projection_dim: F, the dimension to which the feature is mapped; 0 for no map.
    rngs: Source of the initial values, which are distributed as in big_vision.

  References: SigLIP 2 (arXiv 2502.14786), section 2.1; big_vision, models/vit.py with `pool_type="map"`. CLIP (arXiv
  2103.00020), section 2.4; `CLIPVisionModelWithProjection` of transformers. DINOv2 (arXiv 2304.07193), registers (arXiv
  2309.16588); `Dinov2Model` and `Dinov2WithRegistersModel` of transformers.
  """

  def __init__(
    self,
    image_size: int,
    patch_size: int,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    mlp_dim: int,
    dtype: str = "float32",
    remat: bool = False,
    layer_norm_eps: float = 1e-6,
    *,
    activation: str = "gelu_tanh",
    gated: bool = False,
    layer_scale: bool = False,
    patch_bias: bool = True,
    class_token: bool = False,
    num_registers: int = 0,
    embedding_norm: bool = False,
    projection_dim: int = 0,
    rngs: nnx.Rngs,
  ):
    self.patch_size = patch_size
    self.grid = image_size // patch_size
    self.embed_dim = embed_dim
    self.dtype = dtype
    self.remat = remat
    self.patch_embedding = layers.Linear(
      {"patch_height": patch_size, "patch_width": patch_size, "channel": 3},
      {"embed": embed_dim},
      bias=patch_bias,
      dtype=dtype,
      kernel_init=jax.nn.initializers.lecun_normal(),
      rngs=rngs,
    )
    normal = jax.nn.initializers.normal(embed_dim**-0.5)

    def new_vectors(count: int) -> Array:
      return normal(rngs.params(), (count, embed_dim), jnp.float32)

    # The class token has the first position; registers have none.
    self.position_embedding = nnx.Param(new_vectors(class_token + self.grid**2), axes=("position", "embed"))
    self.class_token = nnx.Param(new_vectors(1)[0], axes=("embed",)) if class_token else None
    self.registers = nnx.Param(new_vectors(num_registers), axes=("position", "embed")) if num_registers else None
    self.embedding_norm = layers.LayerNorm(embed_dim, layer_norm_eps) if embedding_norm else None
    block = _BlockOptions(embed_dim, num_heads, mlp_dim, layer_norm_eps, dtype, activation, gated, layer_scale)
    self.layers = stack_layers(lambda layer_rngs: PreNormLayer(block, rngs=layer_rngs), num_layers, rngs)
    self.final_norm = layers.LayerNorm(embed_dim, layer_norm_eps)
    self.head = None if class_token else AttentionPool(block, rngs=rngs)
    projection: dict[str, Any] = {"bias": False, "dtype": dtype, "kernel_init": _xavier, "rngs": rngs}
    self.projection = (
      layers.Linear({"embed": embed_dim}, {"feature": projection_dim}, **projection) if projection_dim else None
    )

  def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
    """Returns the features of images.

    Args:
      pixels: Red, green and blue, normalized as the tower expects (-1..1 for SigLIP), [B, H, W, 3]. H and W must be
        the tower's `image_size`.

    Returns:
      float32 [B, F], pooled and not normalized.

    Raises:
      ValueError: If the number of patches differs from the tower's number of positions.
    """
    tokens = self.encode(self.embed(pixels))
    pooled = self.final_norm(tokens[:, 0]) if self.head is None else self.head(self.final_norm(tokens))
    return (pooled if self.projection is None else self.projection(pooled)).astype(jnp.float32)

  def embed(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
    """Returns the input of the layers: class token, registers, and a vector per patch, row by row, with positions."""
    batch, height, width, _ = pixels.shape
    size, grid = self.patch_size, self.grid
    if (height // size, width // size) != (grid, grid):
      raise ValueError(
        f"images of {height} x {width} pixels have {height // size} x {width // size} patches of {size}"
        f" pixels; the tower has positions for {grid} x {grid}"
      )
    patches = pixels[:, : grid * size, : grid * size].reshape(batch, grid, size, grid, size, 3)
    x = self.patch_embedding(patches.swapaxes(2, 3)).reshape(batch, grid**2, self.embed_dim)

    def repeated(tokens: Array) -> Array:
      return jnp.broadcast_to(tokens.astype(x.dtype), (batch, len(tokens), self.embed_dim))

    if self.class_token is not None:
      x = jnp.concatenate([repeated(self.class_token[...][None]), x], axis=1)
    x = x + self.position_embedding[...].astype(x.dtype)
    if self.registers is not None:
      x = jnp.concatenate([x[:, :1], repeated(self.registers[...]), x[:, 1:]], axis=1)
    return x if self.embedding_norm is None else self.embedding_norm(x)

  def encode(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the output of the last layer for embedded patches, without the final norm."""
    return self._run(x, return_layers=False)[0]

  def encode_layers(self, x: Float[Array, "B T D"]) -> Float[Array, "layers B T D"]:
    """Returns the input and the output of every layer, [num_layers + 1, B, T, D]."""
    _, outputs = self._run(x, return_layers=True)
    return jnp.concatenate([x[None], outputs])

  def _run(self, x: Array, return_layers: bool) -> tuple[Array, Any]:
    def apply(layer: PreNormLayer, hidden: Array, *_: Any) -> Array:
      return layer(hidden)

    return scan_layers(self.layers, x, apply, remat=self.remat, return_layers=return_layers)


@dataclasses.dataclass(frozen=True)
class _BlockOptions:
  """Sizes and options of a block; the attributes are arguments of `VisionTransformer`."""

  embed_dim: int
  num_heads: int
  mlp_dim: int
  layer_norm_eps: float
  dtype: str
  activation: str
  gated: bool
  layer_scale: bool


class _Block(nnx.Module):
  """Attention, and a feed-forward network with its norm and residual sum.

  Args:
    options: Sizes and options.
    rngs: Source of the initial values.
  """

  def __init__(self, options: _BlockOptions, *, rngs: nnx.Rngs):
    embed, mlp = {"embed": options.embed_dim}, {"mlp": options.mlp_dim}
    linear: dict[str, Any] = {"dtype": options.dtype, "kernel_init": _xavier, "rngs": rngs}
    self.activation = options.activation
    self.attention = Attention(options.embed_dim, options.num_heads, **linear)
    self.mlp_norm = layers.LayerNorm(options.embed_dim, options.layer_norm_eps)
    self.gate = layers.Linear(embed, mlp, **linear) if options.gated else None
    self.up = layers.Linear(embed, mlp, **linear)
    self.down = layers.Linear(mlp, embed, **linear)
    self.mlp_scale = _scale(options)

  def feed_forward(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns x + scale * MLP(LN(x))."""
    normalized, activation = self.mlp_norm(x), _ACTIVATIONS[self.activation]
    up = self.up(normalized)
    wide = activation(up) if self.gate is None else activation(self.gate(normalized)) * up
    return x + _scaled(self.down(wide), self.mlp_scale)


class PreNormLayer(_Block):
  """Transformer layer that normalizes before the attention and before the feed-forward network.

  The arguments are those of `_Block`.
  """

  def __init__(self, options: _BlockOptions, *, rngs: nnx.Rngs):
    super().__init__(options, rngs=rngs)
    self.attention_norm = layers.LayerNorm(options.embed_dim, options.layer_norm_eps)
    self.attention_scale = _scale(options)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Applies the layer to [B, T, D]."""
    return self.feed_forward(x + _scaled(self.attention(self.attention_norm(x), None), self.attention_scale))


class AttentionPool(_Block):
  """Attention pooling: a learned probe attends to all tokens. The arguments are those of `_Block`."""

  def __init__(self, options: _BlockOptions, *, rngs: nnx.Rngs):
    self.probe = nnx.Param(_xavier(rngs.params(), (1, options.embed_dim), jnp.float32)[0], axes=("embed",))
    super().__init__(options, rngs=rngs)

  def __call__(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    """Pools [B, T, D] to [B, D]."""
    probe = jnp.broadcast_to(self.probe[...].astype(tokens.dtype), (len(tokens), 1, tokens.shape[-1]))
    return self.feed_forward(self.attention.cross(probe, tokens)[:, 0])


def _scale(options: _BlockOptions) -> Any:
  """Returns a new layer scale of ones; None if the layers have none."""
  return nnx.Param(jnp.ones((options.embed_dim,)), axes=("embed",)) if options.layer_scale else None


def _scaled(x: Array, scale: Any) -> Array:
  return x if scale is None else x * scale[...].astype(x.dtype)


def define_vision(arguments: dict[str, Any]) -> tuple[nnx.GraphDef[Any], Tree, Tree]:
  """Returns structure, shapes and logical axes of a tower without computing any value; see `split_params`.

  Args:
    arguments: Keyword arguments of `VisionTransformer`, except `rngs`.
  """
  return split_params(nnx.eval_shape(lambda: VisionTransformer(**arguments, rngs=nnx.Rngs(0))))


def feature_size(arguments: dict[str, Any]) -> int:
  """Returns F, the size of the features of a tower, for the arguments of `VisionTransformer`."""
  return arguments.get("projection_dim") or arguments["embed_dim"]
