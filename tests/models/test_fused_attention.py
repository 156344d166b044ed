"""Fused attention: equal to the reference, no leaks between segments, refusals, choice, and compilation."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.ahead_of_time.cost import program_cost
from vixml_jax.ahead_of_time.topology import machine_of
from vixml_jax.models import attention, attention_cudnn, attention_reference, attention_splash
from vixml_jax.models.attention_call import AUTO, CUDNN, IMPLEMENTATIONS, REFERENCE, SPLASH, AttentionCall

# On a CPU: the kernel for TPUs step by step, and what cuDNN computes, by XLA.
KERNELS = {
  SPLASH: functools.partial(attention_splash.attend, interpret=True),
  CUDNN: functools.partial(attention_cudnn.attend, implementation="xla"),
}
PLATFORMS = ("cpu", "tpu", "gpu", "metal")
CALL = AttentionCall("tpu", 64, 128, 14, 2, 64, "bfloat16", segmented=True, dropout=False)
# Six segments, the last one of padding; and a row of one segment.
SEGMENTS = np.stack([np.repeat([1, 2, 3, 4, 5, 0], [5, 40, 1, 60, 13, 9]), np.ones(128)]).astype(np.int32)


def arrays(heads=4, kv_heads=4, head_dim=16, length=128, dtype=np.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(2, length, n, head_dim)), dtype) for n in (heads, kv_heads, kv_heads)]


def outputs_and_gradients(attend, q, k, v):
  weights = np.random.default_rng(1).normal(size=q.shape)

  def loss(q, k, v):
    mixed = attend(q, k, v).astype(jnp.float32)
    return (mixed * weights).sum(), mixed

  gradients, mixed = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return [mixed, *gradients]


def check_equal(found, wanted, atol=2e-5):
  for ours, theirs in zip(found, wanted, strict=True):
    assert np.isfinite(ours).all(), "padding stays finite"
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("heads,kv_heads,causal", [(2, 2, False), (4, 2, True), (4, 1, False)])
def test_outputs_and_gradients_equal_the_reference(name, heads, kv_heads, causal):
  q, k, v = arrays(heads, kv_heads)
  segments = jnp.asarray(SEGMENTS)
  found = outputs_and_gradients(lambda *x: KERNELS[name](*x, segments, causal), q, k, v)
  wanted = outputs_and_gradients(lambda *x: attention_reference.attend(*x, segments, causal=causal), q, k, v)
  check_equal(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_of_several_blocks_equals_the_reference(causal, monkeypatch):
  monkeypatch.setattr(attention_splash, "_MAX_BLOCK", 128)
  q, k, v = arrays(2, 1, length=256)
  # The second row has two segments, and the padding of the first is in both blocks.
  segments = jnp.concatenate([SEGMENTS, SEGMENTS + 5 * (SEGMENTS > 0)], axis=1)
  found = outputs_and_gradients(lambda *x: KERNELS[SPLASH](*x, segments, causal), q, k, v)
  wanted = outputs_and_gradients(lambda *x: attention_reference.attend(*x, segments, causal=causal), q, k, v)
  check_equal(found, wanted)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_tokens_of_a_segment_do_not_change_a_bit_of_another(name, causal):
  q, k, v = arrays(2, 1)
  attend = jax.jit(lambda *x: KERNELS[name](*x, jnp.asarray(SEGMENTS), causal))
  changed = SEGMENTS[0] == 4
  before, after = attend(q, k, v), attend(*(x.at[0, changed].add(3.0) for x in (q, k, v)))
  assert (before[0, changed] != after[0, changed]).any()
  np.testing.assert_array_equal(before[0, ~changed], after[0, ~changed])
  np.testing.assert_array_equal(before[1], after[1])


def test_a_mask_that_is_added_gives_the_bits_of_one_that_replaces_logits():
  logits = 1e4 * jnp.einsum("rqhd,rkhd->rhqk", *arrays()[:2])
  other = SEGMENTS[:, None, :, None] != SEGMENTS[:, None, None, :]
  for mask, causal in ((other, False), (other | ~np.tri(128, dtype=bool), True)):
    bias = attention_reference._bias(jnp.asarray(SEGMENTS), causal, 128)
    assert bias.shape == (2, 1, 128, 128), "it has no dimension of heads"
    np.testing.assert_array_equal(logits + bias, jnp.where(mask, np.finfo(np.float32).min, logits))


@pytest.mark.parametrize("name", KERNELS)
def test_devices_share_rows_and_heads(name, monkeypatch):
  fused = attention._FUSED[name]
  monkeypatch.setitem(attention._FUSED, name, fused._replace(check=lambda call: None, attend=KERNELS[name]))
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
  q, k, v = arrays(4, 2)
  rows = sharding.named_sharding(mesh, "row", "position", "heads", "head_dim")

  def attend(*x):
    with sharding.use_mesh(mesh):
      return attention.segment_attention(*x, jnp.asarray(SEGMENTS), causal=True, implementation=name)

  found = outputs_and_gradients(attend, *(jax.device_put(x, rows) for x in (q, k, v)))
  assert found[0].sharding.shard_shape(q.shape) == (1, 128, 2, 16), "nothing was gathered"
  check_equal(found, outputs_and_gradients(lambda *x: KERNELS[name](*x, jnp.asarray(SEGMENTS), True), q, k, v))


@pytest.mark.parametrize(
  "name,changes,message",
  [
    (SPLASH, {"platform": "gpu"}, "it needs a TPU, and the platform is gpu"),
    (SPLASH, {"dtype": "float16"}, "it computes in bfloat16 or float32, not in float16"),
    (SPLASH, {"length": 192}, "rows must be a multiple of 128 tokens long, not 192"),
    (SPLASH, {"head_dim": 48}, "the width of a head must be a multiple of 32, not 48"),
    (CUDNN, {"platform": "cpu"}, "it needs an NVIDIA GPU, and the platform is cpu"),
    (CUDNN, {"dtype": "float32"}, "it computes in bfloat16 or float16, not in float32"),
    (CUDNN, {"head_dim": 136}, "the width of a head must be a multiple of 8 and at most 128, not 136"),
    (CUDNN, {"head_dim": 20}, "the width of a head must be a multiple of 8 and at most 128, not 20"),
    (CUDNN, {"length": 127}, "rows must have an even number of tokens, not 127"),
    *(
      (name, changes, message)
      for name in KERNELS
      for changes, message in (
        ({"segmented": False}, "it needs packed rows"),
        ({"dropout": True}, "it has no dropout of attention probabilities"),
        ({"windowed": True}, "it has no window of tokens .*, which rows of 128 tokens need"),
        ({"row_devices": 3}, "64 rows cannot be shared evenly by 3 devices"),
        ({"head_devices": 4}, "14 heads cannot be shared evenly by 4 devices"),
        ({"head_devices": 7}, "2 heads of keys cannot be shared evenly by 7 devices"),
      )
    ),
  ],
)
def test_what_an_implementation_cannot_do_is_an_error_and_auto_takes_the_reference(name, changes, message):
  supported = dataclasses.replace(CALL, platform={SPLASH: "tpu", CUDNN: "gpu"}[name])
  assert attention.choose(name, supported) == name
  refused = dataclasses.replace(supported, **changes)
  with pytest.raises(ValueError, match=f"attention '{name}': {message}"):
    attention.choose(name, refused)
  if refused.platform == supported.platform:
    assert attention.choose(AUTO, refused) == REFERENCE


def test_gpus_that_cudnn_does_not_support_are_refused():
  for capability in ("7.5", "gfx90a"):
    with pytest.raises(ValueError, match=f"this one has {capability}"):
      attention_cudnn._check_capability(capability)
  attention_cudnn._check_capability("8.0")
  attention_cudnn._check_capability("10.3")


def test_auto_takes_cudnn_on_gpus_and_the_reference_elsewhere():
  found = {platform: attention.choose(AUTO, dataclasses.replace(CALL, platform=platform)) for platform in PLATFORMS}
  assert found == {"cpu": REFERENCE, "tpu": REFERENCE, "gpu": CUDNN, "metal": REFERENCE}


def test_an_unknown_name_is_an_error():
  with pytest.raises(ValueError, match=f"attention 'flash': must be one of {', '.join(IMPLEMENTATIONS)}"):
    attention.choose("flash", CALL)


def test_arrays_describe_their_call():
  q, k, v = arrays(4, 2)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with sharding.use_mesh(mesh):
    found = AttentionCall.of(q, k, segmented=True, dropout=False)
  assert found == AttentionCall("cpu", 2, 128, 4, 2, 16, "float32", True, False, row_devices=4, head_devices=2)
  with pytest.raises(ValueError, match="attention 'cudnn': it needs an NVIDIA GPU, and the platform is cpu"):
    attention.segment_attention(q, k, v, jnp.asarray(SEGMENTS), implementation=CUDNN)


def compiled_step(topology, name, heads, kv_heads, head_dim, causal):
  """The optimized program of outputs and gradients, in bfloat16, for two rows and two tensor-parallel halves."""
  where = machine_of(topology)
  mesh = where.mesh(2, 1, 2)
  rows = functools.partial(sharding.named_sharding, mesh, "row", "position")
  q, k, v = (
    jax.ShapeDtypeStruct((4, 128, n, head_dim), jnp.bfloat16, sharding=rows("heads", "head_dim"))
    for n in (heads, kv_heads, kv_heads)
  )
  segments = jax.ShapeDtypeStruct((4, 128), np.int32, sharding=rows())

  def loss(q, k, v, segments):
    with sharding.use_mesh(mesh):
      mixed = attention.segment_attention(q, k, v, segments, causal=causal, implementation=name)
    return mixed.astype(jnp.float32).sum()

  lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, segments)
  return lowered.compile(dict(where.compiler_options)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
  "topology,name,calls",
  [
    *((topology, SPLASH, ("splash_mha_fwd", "splash_mha_dkv")) for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")),
    ("h100:4", CUDNN, ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")),
  ],
)
@pytest.mark.parametrize(
  "heads,kv_heads,head_dim,causal", [(4, 2, 64, True), (4, 4, 32, False), (4, 2, 128, True), (2, 2, 64, False)]
)
def test_kernels_compile_and_their_flops_are_counted(topology, name, calls, heads, kv_heads, head_dim, causal):
  wheels = {SPLASH: ("libtpu",), CUDNN: ("jax_cuda12_plugin", "nvidia", "nvidia.cudnn")}[name]
  if not all(map(importlib.util.find_spec, wheels)):
    pytest.skip("needs the compiler: pip install -e '.[tpu]' or '.[aot-gpu]'")
  text = compiled_step(topology, name, heads, kv_heads, head_dim, causal)
  assert all(call in text for call in calls)
  # Of each device: two rows, half of the heads; two products forward and five backward.
  assert program_cost(text).flops == (2 + 5) * 2 * 2 * (heads // 2) * 128 * 128 * head_dim
