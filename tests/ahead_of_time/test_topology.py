"""Machines by name: slices of TPUs and hosts with GPUs."""

import importlib.util
import re

import pytest

from vixml_jax.ahead_of_time import gpu, tpu
from vixml_jax.ahead_of_time.machine import Switch, Torus
from vixml_jax.ahead_of_time.topology import machine_of
from vixml_jax.errors import InputError


@pytest.mark.parametrize(
  "topology",
  ["v5e", "v5e:4", "v5e:2x2x2", "v5p:2x2", "h100", "h100:0", "h100:9", "h100:4x4", "v5e:4x4*0", "v5e:4x4*", "h100:4*2"],
)
def test_an_unknown_topology_raises_an_error_with_examples(topology):
  with pytest.raises(InputError, match=f"--topology={re.escape(topology)}: .*v5e:4x4.*h100:8"):
    machine_of(topology)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'vixml-jax\[tpu\]'"):
    machine_of("v5e:2x2")


def test_without_the_cuda_compiler_the_error_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'vixml-jax\[aot-gpu\]'"):
    machine_of("h100:1")


def test_a_program_may_use_the_share_of_a_gpu_that_jax_allocates(monkeypatch):
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  assert gpu.memory_fraction() == 0.75
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
  assert gpu.GPUS["h100"].chip(gpu.memory_fraction()).hbm_bytes == 0.95 * 84_929_347_584


@pytest.mark.parametrize("share", ["0", "1.5", "most"])
def test_an_impossible_share_of_a_gpu_raises_an_error_that_names_the_variable(share, monkeypatch):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
  with pytest.raises(InputError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={share}"):
    gpu.memory_fraction()


def test_a_precise_product_in_float32_takes_as_long_as_nvidia_publishes():
  # 989 TFLOP/s in bfloat16, half of that in TF32, 67 in float32 (data sheet of the H100 SXM).
  cost = gpu.GPUS["h100"].chip(1.0).product_cost
  assert cost["default"] == pytest.approx(2.0)
  assert cost["highest"] == pytest.approx(989 / 67, rel=0.01)


def test_a_product_of_few_bits_takes_as_long_as_the_makers_publish():
  # H100 SXM: 1,979 TFLOP/s in float8 and TOP/s in int8, 989 TFLOP/s in bfloat16. A100: 624 TOP/s in int8, no float8.
  hopper, ampere = (gpu.GPUS[name].chip(1.0).product_cost for name in ("h100", "a100"))
  assert hopper["int8"] == hopper["float8"] == pytest.approx(0.5, rel=0.001)
  assert (ampere["int8"], ampere["float8"]) == (0.5, 1.0)
  # TPUs: 393 TOP/s in int8 of v5e, 918 of v5p, 1,836 of v6e; as in bfloat16 on v4. No peak in float8.
  costs = {name: tpu.TPUS[name].chip.product_cost for name in tpu.TPUS}
  assert {name: cost.get("int8", 1.0) for name, cost in costs.items()} == dict(
    v4=1.0, v5e=0.5, v5p=0.5, v6e=0.5, tpu7x=1.0
  )
  # TPU7x: 4,614 TFLOP/s in float8, 2,307 in bfloat16.
  assert {name for name, cost in costs.items() if cost.get("float8", 1.0) == 0.5} == {"tpu7x"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[tpu]'")
@pytest.mark.parametrize(("name", "devices", "hosts"), [("v5e:4x4*2", 32, 8), ("tpu7x:2x2x1", 8, 1)])
def test_slices_are_described_with_a_mesh_that_divides_them_along_data(name, devices, hosts):
  machine = machine_of(name)
  assert (machine.name, len(machine.devices), machine.hosts) == (name, devices, hosts)
  slices = [
    {getattr(device, "slice_index", 0) for device in row.flat} for row in machine.mesh(2, devices // 2, 1).devices
  ]
  assert slices == ([{0}, {1}] if "*" in name else [{0}, {0}])


def test_each_device_of_a_chip_with_two_has_half_of_it():
  # docs.cloud.google.com/tpu/docs/tpu7x: 2,307 TFLOP/s, 7,380 GB/s, 1,200 GB/s of links in both directions.
  kind = tpu.TPUS["tpu7x"]
  assert kind.devices_per_chip * kind.chip.flops == 2307e12
  assert kind.devices_per_chip * kind.chip.hbm_bandwidth == 7380e9
  assert kind.devices_per_chip * kind.link_bandwidth * 2 * kind.axes * 2 == 1200e9


def test_rings_use_the_links_of_all_axes_that_they_span():
  torus = Torus((4, 4), 50e9, wraps_at=16)
  assert torus.ring_bandwidth(4) == 50e9
  assert torus.ring_bandwidth(16) == 100e9, "sixteen chips span both axes"
  assert Torus((16, 16), 50e9, wraps_at=16).ring_bandwidth(4) == 100e9, "an axis of 16 is a ring"
  assert Switch(450e9).ring_bandwidth(2) == Switch(450e9).ring_bandwidth(8) == 450e9
