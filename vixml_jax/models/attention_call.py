"""The names of the implementations of attention, and what the choice among them depends on."""

import dataclasses

from vixml_jax import sharding
from vixml_jax.typing import Array

AUTO, REFERENCE, SPLASH, CUDNN = "auto", "reference", "splash", "cudnn"
# What `encoder.attention` may be.
IMPLEMENTATIONS = (AUTO, REFERENCE, SPLASH, CUDNN)


@dataclasses.dataclass(frozen=True)
class AttentionCall:
  """One use of attention: where it runs, its shapes, and what it asks for.

  Attributes:
    platform: Platform of the devices: "cpu", "gpu" or "tpu".
    rows: Number of packed rows R.
    length: Number of tokens of a row T.
    num_heads: Number of heads of the queries H.
    num_kv_heads: Number of heads of the keys and values G.
    head_dim: Width of a head.
    dtype: Dtype of queries, keys and values.
    segmented: Whether a token attends to its own segment only, as in packed rows.
    dropout: Whether attention probabilities are dropped.
    windowed: Whether a token does not attend to tokens that are far from it.
    row_devices: Number of devices that share the rows.
    head_devices: Number of devices that share the heads.
  """

  platform: str
  rows: int
  length: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: str
  segmented: bool
  dropout: bool
  windowed: bool = False
  row_devices: int = 1
  head_devices: int = 1

  @classmethod
  def of(cls, query: Array, key: Array, segmented: bool, dropout: bool, windowed: bool = False) -> "AttentionCall":
    """Returns the call of arrays within `sharding.use_mesh`, or on JAX's default platform without a mesh."""
    rows, length, num_heads, head_dim = query.shape
    shape = (rows, length, num_heads, key.shape[2], head_dim)
    devices = (sharding.sharers("row"), sharding.sharers("heads"))
    return cls(sharding.platform(), *shape, str(query.dtype), segmented, dropout, windowed, *devices)

  def check_packed(self) -> None:
    """Checks what no fused implementation can do.

    Raises:
      ValueError: If there are no segments, there is dropout or a window, or the devices cannot share the rows or heads
        evenly.
    """
    if not self.segmented:
      raise ValueError("it needs packed rows, whose tokens have segments")
    if self.dropout:
      raise ValueError("it has no dropout of attention probabilities (encoder.attention_dropout)")
    if self.windowed:
      raise ValueError(
        f"it has no window of tokens (encoder.window), which rows of {self.length} tokens need (train.row_length)"
      )
    if self.rows % self.row_devices:
      raise ValueError(f"{self.rows} rows cannot be shared evenly by {self.row_devices} devices")
    for name, heads in (("heads", self.num_heads), ("heads of keys", self.num_kv_heads)):
      if heads % self.head_devices:
        raise ValueError(f"{heads} {name} cannot be shared evenly by {self.head_devices} devices (mesh.tensor)")


def reach_of(window: int, causal: bool) -> int:
  """Returns how far a token of a local layer attends, as an exclusive bound. Rows of at most this length need no mask.

  Args:
    window: Number of tokens that a token attends to, itself included. Without `causal` they lie on both sides of it.
    causal: Whether a token attends only to itself and to earlier tokens.

  Reference: `Gemma3TextConfig` of transformers, which halves `sliding_window` for bidirectional attention.
  """
  return window if causal else window // 2 + 1
