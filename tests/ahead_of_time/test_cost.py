"""Costs of compiled programs against counts by hand: FLOPs, HBM traffic, collectives, loops and branches."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.cost import program_cost


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


def test_precise_products_in_float32_take_six_passes():
  def product(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

  text, of_xla = optimized(product, jnp.ones((32, 64)), jnp.ones((64, 16)))
  cost = program_cost(text)
  assert cost.flops == of_xla == 2 * 32 * 64 * 16
  assert cost.unit_flops in (cost.flops, 6 * cost.flops)  # XLA for CPUs may omit the precision from the text.
  precise = text.replace("lhs_contracting_dims", "operand_precision={highest,highest}, lhs_contracting_dims")
  assert program_cost(precise).unit_flops == 6 * cost.flops


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
