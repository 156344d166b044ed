"""The vision tower of SigLIP and SigLIP 2 (fixed resolutions): maps pixels to one feature vector per image."""

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


class SiglipVision(nnx.Module):
  """Pre-norm vision transformer with learned positions and attention pooling.

  There is no class token. Patches do not overlap; pixels beyond the last whole patch, at the right and at the bottom,
  are ignored (6 of 384 pixels for patches of 14).

  Args:
    image_size: Height and width of the images in pixels.
    patch_size: Height and width of a patch in pixels.
    num_layers: Number of layers.
    embed_dim: D, which is also the dimension F of the features.
    num_heads: Number of attention heads, a divisor of D.
    mlp_dim: Width of the feed-forward networks.
    dtype: Dtype of the computation. Parameters, norms and softmax are float32.
    remat: Whether to recompute the activations of each layer in the backward pass.
    layer_norm_eps: Added to the variance in every norm.
    rngs: Source of the initial values, which are distributed as in big_vision.

  Reference: SigLIP 2 (arXiv 2502.14786), section 2.1; big_vision, models/vit.py with `pool_type="map"`.
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
      dtype=dtype,
      kernel_init=jax.nn.initializers.lecun_normal(),
      rngs=rngs,
    )
    positions = jax.nn.initializers.normal(embed_dim**-0.5)(rngs.params(), (self.grid**2, embed_dim), jnp.float32)
    self.position_embedding = nnx.Param(positions, axes=("position", "embed"))

    def make_layer(layer_rngs: nnx.Rngs) -> PreNormLayer:
      return PreNormLayer(embed_dim, num_heads, mlp_dim, layer_norm_eps, dtype, rngs=layer_rngs)

    self.layers = stack_layers(make_layer, num_layers, rngs)
    self.final_norm = layers.LayerNorm(embed_dim, layer_norm_eps)
    self.head = AttentionPool(embed_dim, num_heads, mlp_dim, layer_norm_eps, dtype, rngs=rngs)

  def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
    """Returns the features of images.

    Args:
      pixels: Red, green and blue in -1..1, [B, H, W, 3]. H and W must be the tower's `image_size`.

    Returns:
      float32 [B, F], pooled and not normalized.

    Raises:
      ValueError: If the number of patches differs from the tower's number of positions.
    """
    return self.head(self.final_norm(self.encode(self.embed(pixels)))).astype(jnp.float32)

  def embed(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
    """Returns the input of the layers: one vector per patch, row by row, with its position added."""
    batch, height, width, _ = pixels.shape
    size, grid = self.patch_size, self.grid
    if (height // size, width // size) != (grid, grid):
      raise ValueError(
        f"images of {height} x {width} pixels have {height // size} x {width // size} patches of {size}"
        f" pixels; the tower has positions for {grid} x {grid}"
      )
    patches = pixels[:, : grid * size, : grid * size].reshape(batch, grid, size, grid, size, 3)
    x = self.patch_embedding(patches.swapaxes(2, 3)).reshape(batch, grid**2, self.embed_dim)
    return x + self.position_embedding[...].astype(x.dtype)

  def encode(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the output of the last layer for embedded patches, without the final norm."""
    return self._run(x, return_layers=False)[0]

  def encode_layers(self, x: Float[Array, "B T D"]) -> Float[Array, "layers B T D"]:
    """Returns the input and the output of every layer, [num_layers + 1, B, T, D]."""
    _, outputs = self._run(x, return_layers=True)
    return jnp.concatenate([x[None], outputs])

  def _run(self, x: Array, return_layers: bool) -> tuple[Array, Any]:
    def apply(layer: PreNormLayer, hidden: Array, _: None, __: Array | None) -> Array:
      return layer(hidden)

    return scan_layers(self.layers, x, apply, remat=self.remat, return_layers=return_layers)


class _Block(nnx.Module):
  """Attention and a feed-forward network with its norm and residual sum; GELU in its tanh form.

  Args:
    embed_dim: D.
    num_heads: Number of heads H, a divisor of D.
    mlp_dim: Width of the feed-forward network.
    layer_norm_eps: Added to the variance in the norms.
    dtype: Dtype of the computation. Norms and softmax are always computed in float32.
    rngs: Source of the initial values.
  """

  def __init__(
    self, embed_dim: int, num_heads: int, mlp_dim: int, layer_norm_eps: float, dtype: str, *, rngs: nnx.Rngs
  ):
    options: dict[str, Any] = {"dtype": dtype, "kernel_init": _xavier, "rngs": rngs}
    self.attention = Attention(embed_dim, num_heads, **options)
    self.mlp_norm = layers.LayerNorm(embed_dim, layer_norm_eps)
    self.up = layers.Linear({"embed": embed_dim}, {"mlp": mlp_dim}, **options)
    self.down = layers.Linear({"mlp": mlp_dim}, {"embed": embed_dim}, **options)

  def feed_forward(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns x + MLP(LN(x))."""
    return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=True))


class PreNormLayer(_Block):
  """Transformer layer that normalizes before the attention and before the feed-forward network.

  The arguments are those of `_Block`.
  """

  def __init__(
    self, embed_dim: int, num_heads: int, mlp_dim: int, layer_norm_eps: float, dtype: str, *, rngs: nnx.Rngs
  ):
    super().__init__(embed_dim, num_heads, mlp_dim, layer_norm_eps, dtype, rngs=rngs)
    self.attention_norm = layers.LayerNorm(embed_dim, layer_norm_eps)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Applies the layer to [B, T, D]."""
    return self.feed_forward(x + self.attention(self.attention_norm(x), None))


class AttentionPool(_Block):
  """Attention pooling: a learned probe attends to all tokens. The arguments are those of `_Block`."""

  def __init__(
    self, embed_dim: int, num_heads: int, mlp_dim: int, layer_norm_eps: float, dtype: str, *, rngs: nnx.Rngs
  ):
    self.probe = nnx.Param(_xavier(rngs.params(), (1, embed_dim), jnp.float32)[0], axes=("embed",))
    super().__init__(embed_dim, num_heads, mlp_dim, layer_norm_eps, dtype, rngs=rngs)

  def __call__(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    """Pools [B, T, D] to [B, D]."""
    probe = jnp.broadcast_to(self.probe[...].astype(tokens.dtype), (len(tokens), 1, tokens.shape[-1]))
    return self.feed_forward(self.attention.cross(probe, tokens)[:, 0])


def define_siglip(arguments: dict[str, Any]) -> tuple[nnx.GraphDef[Any], Tree, Tree]:
  """Returns structure, shapes and logical axes of a tower without computing any value; see `split_params`.

  Args:
    arguments: Keyword arguments of `SiglipVision`, except `rngs`.
  """
  return split_params(nnx.eval_shape(lambda: SiglipVision(**arguments, rngs=nnx.Rngs(0))))
