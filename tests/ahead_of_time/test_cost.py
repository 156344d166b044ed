"""Costs of compiled programs against counts by hand: FLOPs, HBM traffic, collectives, loops and branches."""

from pathlib import Path
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import pytest

from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.cost import program_cost

X, W = jnp.ones((16, 32)), jnp.ones((7, 32, 32))


def optimized(function, *arguments):
  """HLO of a compiled function, and XLA's own count of its FLOPs."""
  compiled = jax.jit(function).lower(*arguments).compile()
  return compiled.as_text(), compiled.cost_analysis()["flops"]


def test_a_tpu_program_costs_what_is_counted_by_hand():
  # As libtpu 0.0.42 writes programs: memory spaces, a batched product as a dilated convolution, a collective divided
  # among fusions, updates in place, an unrolled loop whose bounds are in its condition and before it.
  cost = program_cost((Path(__file__).with_name("tpu_program.hlo")).read_text())
  assert cost.endless == 0
  # Three iterations, from 1 to below 6 in steps of 2. Products of 2 x 4 pairs of 32 x 256 matrices as one convolution.
  assert cost.flops == 3 * 2 * (2 * 4) * 32 * 32 * 256
  # The slice is read from HBM and the update is written to it. Everything else stays in the chip's VMEM.
  assert cost.hbm_bytes == 3 * (32 * 1024 * 2 + 2 * 4 * 32 * 32 * 4)
  # One all-gather in two fusions, and an all-reduce of which each chip keeps a slice.
  whole = 1024 * 1024 * 2
  assert cost.collectives == {Collective("all-gather", whole, 2): 3, Collective("reduce-scatter", whole, 2): 3}
  assert cost.moved == 3 * 2 * whole / 2


def test_a_gpu_program_costs_what_is_counted_by_hand():
  # As XLA writes programs for eight H100: calls of cuBLAS with workspaces, an all-gather in a loop. Of each GPU: seven
  # layers [512, 1024] x [1024, 1024] in bfloat16; in float32 [512, 1024] with itself twice, once at full precision; and
  # [512, 1024] with itself in bfloat16.
  text = (Path(__file__).with_name("gpu_program.hlo")).read_text()
  cost = program_cost(text, product_cost={"default": 2.0, "highest": 15.0})
  layers, product = 7 * 2 * 512 * 1024 * 1024, 2 * 512 * 512 * 1024
  assert cost.flops == layers + 3 * product
  assert cost.unit_flops == layers + (2 + 15 + 1) * product
  assert cost.collectives == {Collective("all-gather", 1024 * 1024 * 2, 8): 7}
  # A layer reads and writes its operands once; the workspace of 32 MiB is not traffic.
  layer = (2 * 512 * 1024 * 1024, 2 * (2 * 512 * 1024 + 1024 * 1024))
  assert cost.kernels[layer] == 7
  # This call occurs in programs with attention of cuDNN: 2 x 4 heads of 128 queries and keys of width 64.
  call = """HloModule m

ENTRY %main (q: bf16[2,128,4,64]) -> (bf16[2,128,4,64], u8[0]) {
  %q = bf16[2,128,4,64]{3,2,1,0} parameter(0)
  ROOT %call = (bf16[2,128,4,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4",\
"128","128"],"tuple_shapes":[]}}}
}
"""
  assert program_cost(call).flops == 2 * 2 * (2 * 4) * 128 * 128 * 64
  assert program_cost(call.replace("Softmax", "SoftmaxBackward")).flops == 5 * 2 * (2 * 4) * 128 * 128 * 64
  spaced = call.replace(":{", ": {").replace(":[", ": [").replace('":"', '": "')
  assert spaced != call and program_cost(spaced).flops == program_cost(call).flops, "XLA writes both"


@pytest.mark.parametrize(
  "dtype, result, target, kind",
  [("f8e4m3fn", "f32", "__cublas$lt$matmul$f8", "float8"), ("s8", "s32", "__cublas$lt$matmul", "int8")],
)
def test_products_of_few_bits_cost_what_is_counted_by_hand(dtype, result, target, kind):
  # As XLA writes a product of quantized activations [64, 128] and a quantized kernel [128, 32] for an H100.
  call = f"""HloModule m

ENTRY %main (x: {dtype}[64,128], w: {dtype}[32,128], one: f32[]) -> ({result}[64,32], s8[4096]) {{
  %x = {dtype}[64,128]{{1,0}} parameter(0)
  %w = {dtype}[32,128]{{1,0}} parameter(1)
  %one = f32[] parameter(2)
  ROOT %call = ({result}[64,32]{{1,0}}, s8[4096]{{0}}) custom-call(%x, %w, %one, %one), custom_call_target="{target}", \
backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"]}},"precision_config":{{"operand_precision":["DEFAULT","DEFAULT"]}}}}}}
}}
"""
  cost = program_cost(call, product_cost={kind: 0.5})
  assert cost.flops == 2 * 64 * 128 * 32 and cost.unit_flops == cost.flops / 2
  assert cost.flops_by_kind == {kind: cost.flops}
  assert cost.hbm_bytes == 64 * 128 + 32 * 128 + 4 * 64 * 32
  # On a TPU the product is no call. Without a rate of its own, it counts as one in bfloat16.
  dot = call.replace("custom-call(%x, %w, %one, %one)", "dot(%x, %w), lhs_contracting_dims={1}")
  assert program_cost(dot).flops_by_kind == {kind: cost.flops} and program_cost(dot).unit_flops == cost.flops


def test_splash_attention_on_a_tpu_costs_what_is_counted_by_hand():
  # As libtpu writes the call: 2 rows of 4 heads, each pair of which shares the keys of 128 tokens of width 64.
  call = """HloModule m

ENTRY %main (i: s8[1,1,1], q: bf16[2,4,128,64], k: bf16[2,2,128,64]) -> (f32[2,128,64], bf16[2,4,128,64]) {
  %i = s8[1,1,1]{2,1,0} parameter(0)
  %q = bf16[2,4,128,64]{3,2,1,0} parameter(1)
  %k = bf16[2,2,128,64]{3,2,1,0:S(1)} parameter(2)
  ROOT %splash_mha_fwd_segmented_residuals.1 = (f32[2,128,64]{2,1,0}, bf16[2,4,128,64]{3,2,1,0:S(1)}) \
custom-call(%i, %i, %q, %k, %k), custom_call_target="tpu_custom_call"
}
"""
  forward, backward = program_cost(call), program_cost(call.replace("_fwd_", "_dkv_"))
  assert forward.flops == 2 * 2 * (2 * 4) * 128 * 128 * 64
  assert backward.flops == 5 * 2 * (2 * 4) * 128 * 128 * 64
  # The masks are two bytes. Keys and the mixed values are in VMEM.
  assert forward.hbm_bytes == 2 + 2 * 4 * 128 * 64 * 2 + 2 * 128 * 64 * 4
  assert program_cost(call.replace("splash_mha", "other")).flops == 0


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
  def layers(x, weights):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

  text, of_xla = optimized(layers, jnp.ones((16, 32)), jnp.ones((7, 32, 32)))
  assert program_cost(text).flops == 7 * 2 * 16 * 32 * 32
  assert of_xla < 2 * 2 * 16 * 32 * 32, "XLA counts loops itself now: program_cost can be removed"


def test_a_loop_within_a_loop_counts_as_the_product():
  def inner(x, weights):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

  def outer(xs, weights):
    return jax.lax.map(lambda x: inner(x, weights), xs)

  text, _ = optimized(outer, jnp.ones((3, 16, 32)), jnp.ones((5, 32, 32)))
  assert program_cost(text).flops == 3 * 5 * 2 * 16 * 32 * 32


def test_a_branch_counts_by_its_share():
  def chunks(filled, xs, w):
    return jax.lax.map(lambda each: jax.lax.cond(each[0], lambda x: x @ w, lambda x: x, each[1]), (filled, xs))

  text, _ = optimized(chunks, jnp.array([True, True, False, False]), jnp.ones((4, 16, 32)), jnp.ones((32, 32)))
  assert program_cost(text).flops == 4 * 2 * 16 * 32 * 32
  assert program_cost(text, branch_share=0.5).flops == 2 * 2 * 16 * 32 * 32


def test_precise_products_in_product_cost_what_the_chip_takes_for_them():
  def product(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

  text, of_xla = optimized(product, jnp.ones((32, 64)), jnp.ones((64, 16)))
  cost = program_cost(text)
  assert cost.flops == cost.unit_flops == of_xla == 2 * 32 * 64 * 16
  text = re.sub(r", operand_precision=\{[^}]*\}", "", text)  # XLA for CPUs may omit the precision.
  precise = text.replace("lhs_contracting_dims", "operand_precision={highest,highest}, lhs_contracting_dims")
  times = {"default": 2.0, "highest": 6.0}
  assert program_cost(precise, product_cost=times).unit_flops == 6 * cost.flops
  assert program_cost(text, product_cost=times).unit_flops == 2 * cost.flops


def test_each_kernel_is_counted_with_its_own_flops_and_traffic():
  text, _ = optimized(lambda x, w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0], X, W)
  cost = program_cost(text)
  assert sum(flops * times for (flops, _), times in cost.kernels.items()) == cost.unit_flops > 0
  assert sum(size * times for (_, size), times in cost.kernels.items()) == pytest.approx(cost.hbm_bytes)
  assert 7 in cost.kernels.values(), "the product of a layer runs seven times"


def test_asynchronous_operations_are_traffic_but_no_kernels():
  text = """HloModule m

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %start = (f32[8,64]{1,0:S(1)}, f32[8,64]{1,0}, u32[]) copy-start(%x)
  %here = f32[8,64]{1,0:S(1)} copy-done(%start)
  ROOT %double = f32[8,64]{1,0} add(%here, %here)
}
"""
  cost = program_cost(text)
  size = 8 * 64 * 4
  assert cost.hbm_bytes == 2 * size, "one copy of HBM to VMEM, and the result"
  assert cost.kernels == {(0.0, size): 1}


def test_the_traffic_of_a_kernel_is_its_operands_and_results():
  text, _ = optimized(lambda x: x * 2 + 1, jnp.ones((256, 1024)))
  assert program_cost(text).hbm_bytes == 2 * 256 * 1024 * 4


def test_collectives_are_counted_by_kind_size_and_group():
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  ring = [(i, (i + 1) % 4) for i in range(4)]

  def exchange(x):
    def body(c, _):
      parts = (
        jax.lax.psum(x * c, "b"),
        jax.lax.all_gather(x * c, "a", tiled=True),
        jax.lax.psum_scatter(x + c, "b", tiled=True),
        jax.lax.ppermute(x - c, "b", ring),
        jax.lax.all_to_all(x / c, "b", 0, 0, tiled=True),
      )
      return c + sum(part.sum() for part in parts), None

    return jax.lax.scan(body, jnp.float32(1), None, length=3)[0][None]

  spec = PartitionSpec("b", None)
  mapped = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("b"), check_vma=False)
  text, _ = optimized(mapped, jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=NamedSharding(mesh, spec)))
  part = 64 * 128 * 4
  assert program_cost(text).collectives == {
    Collective("all-reduce", part, 4): 3,
    Collective("all-gather", 2 * part, 2): 3,
    Collective("reduce-scatter", part, 4): 3,
    Collective("collective-permute", part, 4): 3,
    Collective("all-to-all", part, 4): 3,
  }


def test_a_collective_moves_what_a_ring_moves():
  assert Collective("all-gather", 1000, 4).moved == 750
  assert Collective("reduce-scatter", 1000, 4).moved == 750
  assert Collective("all-reduce", 1000, 4).moved == 1500
  assert Collective("collective-permute", 1000, 4).moved == 1000
