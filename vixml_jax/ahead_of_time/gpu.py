"""Hosts with NVIDIA GPUs, for which XLA's CUDA compiler compiles on a machine without GPU, driver or CUDA toolkit."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from jax.experimental import topologies

from vixml_jax.ahead_of_time.machine import Chip, Machine, Switch
from vixml_jax.errors import InputError, install_command

_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_DEFAULT_FRACTION = 0.75
_GPUS_PER_HOST = 8
# Without a GPU nothing can be tuned by trying it. Matrix products then become calls of cuBLAS instead of Triton kernels
# whose sizes nobody has chosen.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
_PACKAGES = ("jax_cuda12_plugin", "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc", "nvidia.cudnn")


@dataclasses.dataclass(frozen=True)
class _GpuKind:
  """A kind of GPU.

  The rates of products and the bandwidth of NVLink are published by NVIDIA (data sheets of A100, H100 and H200 SXM).
  The attributes from the description on are fields of XLA's target configs of these GPUs (openxla/xla,
  `xla/backends/gpu/target_config/specs`).

  Attributes:
    flops: Peak rate of dense bfloat16 matrix products, in FLOP/s.
    tf32_flops: The same for float32 operands that are rounded to TF32.
    float32_flops: The same for float32 operands at full precision.
    int8_flops: The same for int8 operands.
    float8_flops: The same for float8 operands; that of bfloat16 where XLA converts them.
    efficiency: As in `Chip`; that of the H200 is assumed to be the H100's, which is the same chip.
    nvlink_bandwidth: Bytes/s that a GPU sends over NVLink: half of the published bandwidth, which is that of both
      directions.
    description: Name of the device.
    memory: Bytes of memory.
    memory_bandwidth: Bytes/s.
    cores: Number of multiprocessors.
    float_units: Number of float32 units of a multiprocessor.
    shared_memory: Bytes of shared memory of a multiprocessor.
    l2_cache: Bytes of the L2 cache.
    clock_ghz: Clock rate.
    capability: CUDA compute capability, major version.
    feature_extension: XLA's name for the instructions that only this architecture has.
  """

  flops: float
  tf32_flops: float
  float32_flops: float
  int8_flops: float
  float8_flops: float
  efficiency: float
  nvlink_bandwidth: float
  description: str
  memory: int
  memory_bandwidth: int
  cores: int
  float_units: int
  shared_memory: int
  l2_cache: int
  clock_ghz: float
  capability: int
  feature_extension: str

  @property
  def target_config(self) -> str:
    """The GPU as XLA's compiler reads it, a `stream_executor.GpuTargetConfigProto` in text format."""
    return f"""
      platform_name: "CUDA"
      device_description_str: "{self.description}"
      dnn_version_info {{ major: 9 minor: 8 }}
      runtime_version {{ major: 12 minor: 9 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {self.capability} feature_extension: {self.feature_extension} }}
        device_memory_size: {self.memory}
        memory_bandwidth: {self.memory_bandwidth}
        l2_cache_size: {self.l2_cache}
        clock_rate_ghz: {self.clock_ghz}
        core_count: {self.cores}
        fpus_per_core: {self.float_units}
        threads_per_warp: 32
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        shared_memory_per_core: {self.shared_memory}
        shared_memory_per_block: 49152
        shared_memory_per_block_optin: {self.shared_memory - 1024}
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
      }}
    """

  def chip(self, fraction: float) -> Chip:
    """Returns the GPU with the memory that JAX allocates of it."""
    cost = {"default": self.flops / self.tf32_flops, "high": self.flops / self.tf32_flops}
    cost |= {"int8": self.flops / self.int8_flops, "float8": self.flops / self.float8_flops}
    cost["highest"] = self.flops / self.float32_flops
    return Chip(
      fraction * self.memory, self.flops, self.memory_bandwidth, cost, overlaps=False, efficiency=self.efficiency
    )


_HOPPER: dict[str, Any] = dict(
  flops=989.4e12,
  tf32_flops=494.7e12,
  float32_flops=66.9e12,
  int8_flops=1978.9e12,
  float8_flops=1978.9e12,
  efficiency=0.54,
  nvlink_bandwidth=450e9,
  cores=132,
  float_units=128,
  shared_memory=233_472,
  l2_cache=52_428_800,
  clock_ghz=1.98,
  capability=9,
  feature_extension="ACCELERATED_FEATURES",
)
GPUS = {
  "a100": _GpuKind(
    flops=312e12,
    tf32_flops=156e12,
    float32_flops=19.5e12,
    int8_flops=624e12,
    float8_flops=312e12,
    efficiency=0.68,
    nvlink_bandwidth=300e9,
    description="NVIDIA A100-SXM4-80GB",
    memory=85_100_068_864,
    memory_bandwidth=2_039_040_000_000,
    cores=108,
    float_units=64,
    shared_memory=167_936,
    l2_cache=41_943_040,
    clock_ghz=1.41,
    capability=8,
    feature_extension="NONE",
  ),
  "h100": _GpuKind(
    **_HOPPER, description="NVIDIA H100 80GB HBM3", memory=84_929_347_584, memory_bandwidth=3_352_320_000_000
  ),
  "h200": _GpuKind(
    **_HOPPER, description="NVIDIA H200 141GB HBM3e", memory=151_397_597_184, memory_bandwidth=4_800_000_000_000
  ),
}
EXAMPLES = "h100:1, h100:8, h200:1, a100:1"


def is_shape(shape: str) -> bool:
  """Returns whether a text is a number of GPUs of one host."""
  return re.fullmatch(rf"[1-{_GPUS_PER_HOST}]", shape) is not None


def gpu_host(kind: str, shape: str) -> Machine:
  """Returns GPUs of one host, connected by NVLink, as XLA's CUDA compiler describes them; no GPU is needed.

  A program may use the share of each GPU that JAX allocates: 75 %, or `XLA_PYTHON_CLIENT_MEM_FRACTION` if it is set in
  the environment (docs.jax.dev, "GPU memory allocation").

  Args:
    kind: A key of `GPUS`.
    shape: Number of GPUs, such as "8".

  Raises:
    InputError: If the compiler is not installed, or the environment variable is not a number.
  """
  missing = [name for name in _PACKAGES if not _is_installed(name)]
  if missing:
    raise InputError(
      f"{missing[0]} is not installed, which compiles for GPUs on any machine; run: " + install_command("aot-gpu")
    )
  gpu, count, fraction = GPUS[kind], int(shape), memory_fraction()
  described = topologies.get_topology_desc(platform="cuda", target_config=gpu.target_config, topology=f"1x1x{count}")
  budget = f"{fraction:.0%} of a GPU; {_FRACTION} changes that"
  return Machine(
    f"{kind}:{count}",
    gpu.chip(fraction),
    Switch(gpu.nvlink_bandwidth),
    list(described.devices),
    _GPUS_PER_HOST,
    budget,
    _OPTIONS,
  )


def _is_installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # A package of the dotted name is missing.
    return False


def memory_fraction() -> float:
  """Returns the share of a GPU's memory that JAX allocates."""
  text = os.environ.get(_FRACTION, str(_DEFAULT_FRACTION))
  try:
    fraction = float(text)
  except ValueError:
    fraction = math.nan
  if not 0 < fraction <= 1:
    raise InputError(f"{_FRACTION}={text}: must be a number above 0 and at most 1, such as 0.95")
  return fraction
