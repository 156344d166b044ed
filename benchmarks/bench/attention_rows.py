"""Rows of attention: implementations of attention within the items of packed rows, forward and backward."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench.data import text_lengths
from benchmarks.bench.harness import OURS, Check, Cost, Side, Started, UnavailableError, Work
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.models.attention import segment_attention
from vixml_jax.models.attention_call import CUDNN, REFERENCE
from vixml_jax.models.attention_cudnn import attend
from vixml_jax.ragged import Ragged

_LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 3e-2}
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


def attention_64(size: str) -> Work:
  """Attention in packed rows of 64 tokens."""
  return _attention(size, 64)


def attention_128(size: str) -> Work:
  """Attention in packed rows of 128 tokens."""
  return _attention(size, 128)


def attention_256(size: str) -> Work:
  """Attention in packed rows of 256 tokens."""
  return _attention(size, 256)


def _attention(size: str, length: int) -> Work:
  """Makes queries, keys and values of packed titles, with 12 heads of 64 as in BERT."""
  tokens, heads, width, dtype = {
    "tiny": (2 * length, 2, 8, "float32"),
    "cpu": (8_192, 12, 32, "float32"),
    "gpu": (131_072, 12, 64, "bfloat16"),
  }[size]
  rows = tokens // length
  segments = _packed_segments(rows, length)
  rng = np.random.default_rng(0)
  inputs = [rng.standard_normal((rows, length, heads, width), np.float32) for _ in range(4)]

  def check(ours: np.ndarray, theirs: np.ndarray) -> Check:
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
    return Check(difference <= _LARGEST_DIFFERENCE[dtype], f"output and gradient differ by {difference:.1e}")

  ours = functools.partial(segment_attention, segments=jnp.asarray(segments))
  products = _FORWARD_PRODUCTS + _BACKWARD_PRODUCTS
  squares = sum(float(np.square(np.bincount(row)[1:], dtype=np.float64).sum()) for row in segments)
  torch_side = functools.partial(_torch, inputs, segments, dtype, size)
  return Work(
    what=(
      f"{rows:,} rows of {length} tokens, {heads} heads of {width}, {dtype}, full of items with the lengths of titles; "
      "output and gradients of queries, keys and values"
    ),
    unit="tokens",
    units=float((segments > 0).sum()),
    sides=[
      Side(f"{OURS}, {REFERENCE}", lambda: _jax(functools.partial(ours, implementation=REFERENCE), inputs, dtype)),
      Side(f"{OURS}, {CUDNN}", lambda: _jax(functools.partial(ours, implementation=CUDNN), inputs, dtype, "gpu")),
      Side(
        "jax.nn.dot_product_attention",
        lambda: _jax(lambda *x: attend(*x, jnp.asarray(segments), causal=False, implementation="xla"), inputs, dtype),
      ),
      Side("torch SDPA with a mask", lambda: torch_side("sdpa"), ("torch",)),
      Side("torch flex_attention, compiled", lambda: torch_side("flex"), ("torch",)),
      Side("torch flash attention, unpadded", lambda: torch_side("flat"), ("torch", "transformers")),
    ],
    check=check,
    cost=Cost("flops", 2.0 * products * heads * width * squares, dtype),
  )


def _packed_segments(rows: int, length: int) -> np.ndarray:
  """Returns the slots of the tokens of full rows of titles, int32 [rows, length]; 0 for padding."""
  lengths = text_lengths(rows * length, np.random.default_rng(1))
  items = Items.of_texts(Ragged.of_lengths(np.ones(lengths.sum(), np.int32), lengths))
  return pack(items, PackedLayout(length, 1), round_up=False).segments[:rows, 0]


def _jax(function: Callable[..., Any], inputs: list[np.ndarray], dtype: str, platform: str = "") -> Started:
  if platform and jax.default_backend() != platform:
    raise UnavailableError(f"it needs a {platform.upper()}")
  *arrays, cotangent = (jnp.asarray(x, dtype) for x in inputs)

  @jax.jit
  def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    output, pull_back = jax.vjp(function, *arrays)
    return output, *pull_back(cotangent)

  return Started(
    lambda _: jax.block_until_ready(run(*arrays)),
    np.concatenate([np.asarray(part, np.float32).ravel() for part in run(*arrays)]),
  )


def _torch(inputs: list[np.ndarray], segments: np.ndarray, dtype: str, size: str, kind: str) -> Started:
  import torch

  from benchmarks.bench.torch_device import device, synchronize

  if kind == "flat" and size == "cpu":
    raise UnavailableError("flash attention of torch needs a GPU")
  if kind == "flex" and device().type == "cpu":
    raise UnavailableError("flex_attention has no gradients on a CPU")
  slots = torch.from_numpy(segments).to(device())
  *arrays, cotangent = (torch.from_numpy(x).to(device(), getattr(torch, dtype)).transpose(1, 2) for x in inputs)
  leaves = [x.detach().clone().requires_grad_() for x in arrays]
  attend_to = {"sdpa": _sdpa, "flex": _flex, "flat": _flat}[kind](slots)

  def run(_: int) -> list[Any]:
    output = attend_to(*leaves)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    synchronize()
    return [output, *gradients]

  parts = [part.detach().transpose(1, 2).float().cpu().numpy().ravel() for part in run(0)]
  return Started(run, np.concatenate(parts))


def _sdpa(slots: Any) -> Callable[..., Any]:
  import torch

  mask = slots[:, None, :, None] == slots[:, None, None, :]
  return lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, attn_mask=mask)


def _flex(slots: Any) -> Callable[..., Any]:
  import torch
  from torch.nn.attention.flex_attention import create_block_mask, flex_attention

  def same(row: Any, head: Any, query: Any, key: Any) -> Any:
    return slots[row, query] == slots[row, key]

  rows, length = slots.shape
  mask = create_block_mask(same, rows, None, length, length, device=slots.device)
  function = torch.compile(flex_attention, dynamic=False)
  return lambda *x: function(*x, block_mask=mask)


def _flat(slots: Any) -> Callable[..., Any]:
  """Takes padding as an item of its own, as the other implementations do."""
  import torch

  from benchmarks.bench.torch_models import flat_attention

  rows, length = slots.shape
  changes = torch.ones_like(slots, dtype=torch.bool)
  changes[:, 1:] = slots[:, 1:] != slots[:, :-1]
  starts = torch.nonzero(changes.flatten())[:, 0].int()
  offsets = torch.cat([starts, starts.new_tensor([rows * length])])
  longest = int(offsets.diff().max())

  def run(*arrays: Any) -> Any:
    flat = [x.transpose(0, 1).flatten(1, 2) for x in arrays]
    output = flat_attention(*flat, offsets, longest, causal=False)
    return output.unflatten(0, (rows, length)).transpose(1, 2)

  return run
