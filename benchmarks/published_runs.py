"""Compares the expected times of `aot_compile` with published training runs, and computes the constants behind them.

  .venv/bin/python benchmarks/published_runs.py

`aot_compile` divides the time of a program's kernels by a share that real runs reach (`Chip.efficiency`). The share of
each kind of chip comes from one published run, the first in the table, and the other runs check it. None of them was
compiled: their kernels are listed here by formula, and go through the same roofline as compiled programs. The script
prints one row for each run: the time of its kernels as a share of the measured time, and how much the expected time is
off.

Sources:
  MaxText (AI-Hypercomputer/maxtext, `src/maxtext/configs/tpu/*/README.md` and the scripts beside them): v4, v5e, v5p.
  MaxText (AI-Hypercomputer/tpu-recipes, `training/trillium/*/README.md`): v6e.
  NeMo AutoModel (NVIDIA-NeMo/Automodel, `docs/performance-summary.mdx` and `examples/llm_benchmark`): H100, LoRA.
  LLM Foundry (mosaicml/llm-foundry, `scripts/train/benchmarking/README.md`): H100 and A100 of 80 GB, bfloat16.
"""

from collections.abc import Iterator
import dataclasses
import math

from vixml_jax.ahead_of_time.collectives import Collective
from vixml_jax.ahead_of_time.cost import Cost
from vixml_jax.ahead_of_time.gpu import GPUS
from vixml_jax.ahead_of_time.machine import Machine, Switch, Torus
from vixml_jax.ahead_of_time.roofline import Roofline
from vixml_jax.ahead_of_time.tpu import TPUS
from vixml_jax.text_columns import aligned

_BYTES = 2  # Of a bfloat16.
_BYTES_ADAM = 28  # Read and written for each parameter: three values in float32, the gradient, and the bfloat16 copy.
_BYTES_LOGIT = 16  # Read and written for each logit: bfloat16 and float32, forward and backward.
_BACKWARD = 2.5  # FLOPs of the backward pass of fused attention, relative to the forward pass.


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder.

  Attributes:
    width: Width of the residual stream.
    layers: Number of layers.
    heads: Number of heads of queries.
    kv_heads: Number of heads of keys and values.
    head_dim: Width of a head.
    mlp_dim: Width of the MLP.
    vocab: Size of the vocabulary.
    gated: Whether the MLP has a gate, and so three matrices instead of two.
  """

  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  vocab: int
  gated: bool = True

  @property
  def products(self) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices of a layer."""
    queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
    mlp = {"gate": (self.width, self.mlp_dim)} if self.gated else {}
    return {
      "query": (self.width, queries),
      "key": (self.width, keys),
      "value": (self.width, keys),
      "output": (queries, self.width),
      **mlp,
      "up": (self.width, self.mlp_dim),
      "down": (self.mlp_dim, self.width),
    }

  @property
  def layer_weights(self) -> int:
    """Number of weights of the matrices of all layers."""
    return self.layers * sum(rows * columns for rows, columns in self.products.values())


def scaled(scale: int) -> Model:
  """Returns the model of MaxText's `global_parameter_scale`, a power of two: about so many billions of parameters."""
  base, rest = divmod(int(math.log2(scale)), 3)
  heads = 16 << base + (rest > 0)
  return Model(2048 << base + (rest > 1), 16 << base, heads, heads, 128, 7168 << base + (rest > 0), 32_000)


def mpt(width: int, layers: int, heads: int) -> Model:
  """Returns a model of LLM Foundry."""
  return Model(width, layers, heads, heads, width // heads, 4 * width, 50_368, gated=False)


LLAMA_8B = Model(4096, 32, 32, 8, 128, 14_336, 128_256)
LLAMA_70B = Model(8192, 80, 64, 8, 128, 28_672, 128_256)
LLAMA2_70B = dataclasses.replace(LLAMA_70B, vocab=32_000)
MISTRAL_7B = dataclasses.replace(LLAMA_8B, vocab=32_000)
QWEN_7B = Model(3584, 28, 28, 4, 128, 18_944, 152_064)
QWEN_32B = Model(5120, 64, 40, 8, 128, 27_648, 152_064)
MPT = {
  "125M": mpt(768, 12, 12),
  "350M": mpt(1024, 24, 16),
  "760M": mpt(1536, 24, 12),
  "1B": mpt(2048, 24, 16),
  "3B": mpt(2560, 32, 20),
  "7B": mpt(4096, 32, 32),
  "13B": mpt(5120, 40, 40),
}

# Products whose results are kept for the backward pass; the others are computed again. None: nothing is.
FULL: frozenset[str] = frozenset()
QKV = frozenset({"query", "key", "value"})
QKV_OUTPUT = QKV | {"output"}
PRODUCTS = frozenset({"query", "key", "value", "output", "gate", "up", "down"})


@dataclasses.dataclass(frozen=True)
class Run:
  """A published training run.

  Attributes:
    chip: A key of `TPUS` or `GPUS`.
    shape: Chips along each axis of the interconnect, as far as it is published; the number of GPUs.
    name: Name of the model.
    model: The model.
    length: Number of tokens of a sequence.
    sequences: Number of sequences in a step of each chip, divided by the chips that share them along `tensor`.
    measured: Tokens/s of each chip.
    kept: Products whose results are kept for the backward pass; None if nothing is computed again.
    tensor: Number of chips that share each product; the others share the parameters.
    rank: Rank of the adapters of all layers; 0 if all parameters are trained.
  """

  chip: str
  shape: tuple[int, ...]
  name: str
  model: Model
  length: int
  sequences: float
  measured: float
  kept: frozenset[str] | None
  tensor: int = 1
  rank: int = 0

  @property
  def title(self) -> str:
    """The run in words."""
    adapters = ", LoRA" if self.rank else ""
    return f"{math.prod(self.shape)} x {self.chip}, {self.name}{adapters}, {self.length} tokens"

  @property
  def seconds(self) -> float:
    """Measured time of a step."""
    return self.sequences * self.length / self.measured

  @property
  def machine(self) -> Machine:
    """The machine, without devices."""
    count = math.prod(self.shape)
    if self.chip in TPUS:
      kind = TPUS[self.chip]
      return Machine(self.chip, kind.chip, Torus(self.shape, kind.link_bandwidth, kind.wraps_at), [], count)
    return Machine(self.chip, GPUS[self.chip].chip(1.0), Switch(GPUS[self.chip].nvlink_bandwidth), [], count)

  @property
  def roofline(self) -> Roofline:
    """Times of a step."""
    cost = Cost()
    for times, flops, size in kernels(self):
      cost.add(Cost(flops, flops, size, {(flops, size): 1.0}), times)
    return Roofline.of(dataclasses.replace(cost, collectives=collectives(self)), self.machine)


def tflops(
  chip: str,
  shape: tuple[int, ...],
  name: str,
  model: Model,
  sequences: float,
  rate: float,
  kept: frozenset[str],
  tensor: int = 1,
) -> Run:
  """Returns a run of which TFLOP/s are published; MaxText counts 6 for each weight, and attention to all tokens."""
  length = 2048
  weights = model.layer_weights + model.width * model.vocab
  token = 6 * weights + 12 * model.layers * length * model.heads * model.head_dim
  return Run(chip, shape, name, model, length, sequences, rate * 1e12 / token, kept, tensor)


def kernels(run: Run) -> Iterator[tuple[float, float, float]]:
  """Yields the kernels of a step on each chip: how often it runs, its FLOPs, and the bytes that it reads and writes."""
  model, layers, tokens = run.model, run.model.layers, run.sequences * run.length * run.tensor
  queries, keys = (heads * model.head_dim / run.tensor for heads in (model.heads, model.kv_heads))
  mlp, branches = model.mlp_dim / run.tensor, 2 if model.gated else 1

  def product(rows: float, columns: float, times: float) -> tuple[float, float, float]:
    return times, 2 * tokens * rows * columns, _BYTES * (tokens * (rows + columns) + rows * columns)

  def elements(each: float, times: float = layers) -> tuple[float, float, float]:
    return times, 0.0, _BYTES * tokens * each

  attention = 2 * tokens * run.length * queries  # To the tokens before, which are half of the sequence.
  shared = {
    name: (rows / run.tensor, columns) if name in ("output", "down") else (rows, columns / run.tensor)
    for name, (rows, columns) in model.products.items()
  }
  for again in (False, True) if run.kept is not None else (False,):
    for name, (rows, columns) in shared.items():
      if not again or name not in {"down", *(run.kept or ())}:  # Nobody reads the last product of a layer again.
        yield product(rows, columns, layers)
        if run.rank:
          yield product(rows, run.rank, layers)
          yield product(run.rank, columns, layers)
    yield layers, attention, _BYTES * tokens * 2 * (queries + keys)
    # Two norms, rotary embeddings, the activation, and two sums with the residual stream.
    yield elements(7 * model.width + 2 * (queries + keys) + (branches + 1) * mlp)
  for rows, columns in shared.values():
    yield product(columns, rows, layers)
    if run.rank:
      yield product(columns, run.rank, 2 * layers)
      yield product(run.rank, rows, 2 * layers)
    else:
      yield product(rows, columns, layers)
  yield layers, _BACKWARD * attention, _BYTES * tokens * 4 * (queries + keys)
  yield elements(12 * model.width + 2 * (queries + keys) + (2 * branches + 1) * mlp)
  yield product(model.width, model.vocab / run.tensor, 2 if run.rank else 3)
  yield elements(_BYTES_LOGIT / _BYTES * model.vocab / run.tensor, 1)
  if not run.rank:
    yield 1, 0.0, _BYTES_ADAM * model.layer_weights / math.prod(run.shape)


def collectives(run: Run) -> dict[Collective, float]:
  """Returns what the chips exchange in a step: parameters twice, gradients once, and sums of shared products."""
  model, sharers = run.model, math.prod(run.shape) // run.tensor
  weights = int(_BYTES * model.layer_weights / run.tensor)
  exchanged: dict[Collective, float] = {}
  if sharers > 1:
    exchanged[Collective("all-gather", weights, sharers)] = 2.0
    if not run.rank:
      exchanged[Collective("reduce-scatter", weights, sharers)] = 1.0
  if run.tensor > 1:
    size = int(_BYTES * run.sequences * run.length * run.tensor * model.width)
    exchanged[Collective("all-reduce", size, run.tensor)] = (4.0 if run.kept is None else 6.0) * model.layers
  return exchanged


# The first run of each chip gives its share; the others check it. The README of v4 does not say how wide a head and how
# many matrices an MLP was at that time: with 256 and two, the models have the stated sizes.
V4_22B = Model(6144, 48, 24, 24, 256, 24_576, 32_000, gated=False)
V4_52B = Model(12_288, 32, 32, 32, 256, 49_152, 32_000, gated=False)
RUNS = [
  tflops("v4", (4, 4, 4), "22B", V4_22B, 13, 156, FULL),
  tflops("v4", (4, 4, 12), "52B", V4_52B, 7, 154, FULL),
  tflops("v5e", (16, 16), "16B", scaled(16), 6, 120, FULL),
  tflops("v5e", (16, 16), "32B", scaled(32), 4, 132, FULL),
  tflops("v5e", (16, 16), "64B", scaled(64), 2, 118, FULL),
  tflops("v5e", (16, 16), "128B", scaled(128), 1, 110, QKV, tensor=16),
  tflops("v5p", (4, 4, 4), "32B", scaled(32), 6, 328, PRODUCTS, tensor=4),
  tflops("v5p", (4, 4, 4), "64B", scaled(64), 3, 323, PRODUCTS, tensor=4),
  tflops("v5p", (4, 4, 8), "128B", scaled(128), 1, 315, PRODUCTS, tensor=8),
  tflops("v5p", (8, 8, 8), "256B", scaled(256), 1, 308, PRODUCTS, tensor=8),
  tflops("v5p", (8, 8, 8), "512B", scaled(512), 1, 294, PRODUCTS, tensor=8),
  Run("v6e", (16, 16), "Llama 3.1 8B", LLAMA_8B, 8192, 4, 7207.3, QKV_OUTPUT),
  Run("v6e", (2, 4), "Llama 3.1 8B", LLAMA_8B, 8192, 3, 7138.9, QKV_OUTPUT),
  Run("v6e", (2, 4), "Mistral 7B", MISTRAL_7B, 8192, 6, 7776.8, QKV_OUTPUT),
  Run("v6e", (16, 16), "Llama 2 70B", LLAMA2_70B, 4096, 2, 905.0, QKV),
  Run("v6e", (16, 16), "Llama 3.1 70B", LLAMA_70B, 8192, 5, 960.2, QKV),
  Run("v6e", (4, 8), "Llama 3.1 70B", LLAMA_70B, 8192, 2, 921.0, QKV),
  Run("h100", (1,), "Llama 3 8B", LLAMA_8B, 4096, 2, 12_472.9, None, rank=16),
  Run("h100", (1,), "Qwen2.5 7B", QWEN_7B, 4096, 2, 14_110.1, None, rank=16),
  Run("h100", (8,), "Qwen2.5 32B", QWEN_32B, 4096, 1, 2250.3, FULL, tensor=2, rank=16),
  Run("h100", (8,), "Llama 3 70B", LLAMA_70B, 4096, 1, 1091.9, FULL, tensor=2, rank=16),
  Run("h100", (8,), "MPT 760M", MPT["760M"], 512, 96, 83_749, None),
  Run("h100", (8,), "MPT 1B", MPT["1B"], 512, 56, 52_275, None),
  Run("h100", (8,), "MPT 3B", MPT["3B"], 512, 40, 27_965, None),
  Run("h100", (8,), "MPT 7B", MPT["7B"], 2048, 6, 10_643, None),
  Run("h100", (8,), "MPT 13B", MPT["13B"], 2048, 2, 4792, None),
  Run("a100", (8,), "MPT 3B", MPT["3B"], 512, 40, 12_127, None),
  Run("a100", (8,), "MPT 125M", MPT["125M"], 512, 128, 165_681, None),
  Run("a100", (8,), "MPT 350M", MPT["350M"], 512, 128, 69_330, None),
  Run("a100", (8,), "MPT 760M", MPT["760M"], 512, 96, 29_446, None),
  Run("a100", (8,), "MPT 1B", MPT["1B"], 512, 56, 23_148, None),
  Run("a100", (8,), "MPT 7B", MPT["7B"], 2048, 6, 4641, None),
  Run("a100", (8,), "MPT 13B", MPT["13B"], 2048, 2, 2262, None),
]


def fitted(runs: list[Run]) -> dict[str, Run]:
  """Returns the run that gives the share of each chip."""
  return {run.chip: run for run in reversed(runs)}


def efficiency(run: Run) -> float:
  """Returns the time of the kernels of a run as a share of the measured time."""
  return run.roofline.kernels / run.seconds


def error(run: Run) -> float:
  """Returns by how much of the measured time the expected time is longer; negative if it is shorter."""
  return run.roofline.expected / run.seconds - 1


def main() -> None:
  """Prints all runs, and how many of those that were not fitted are within 15 %."""
  rows = [["run", "measured, s", "lower bound, s", "expected, s", "off by, %", "kernels / measured", ""]]
  first = fitted(RUNS)
  for run in RUNS:
    times = run.roofline
    rows.append(
      [
        run.title,
        f"{run.seconds:.3f}",
        f"{times.lower_bound:.3f}",
        f"{times.expected:.3f}",
        f"{100 * error(run):+.1f}",
        f"{efficiency(run):.3f}",
        "fitted" if run is first[run.chip] else "checked",
      ]
    )
  print("\n".join(aligned(rows)))
  checked = [abs(error(run)) for run in RUNS if run is not first[run.chip]]
  print(f"{sum(each <= 0.15 for each in checked)} of {len(checked)} checked runs are within 15 %")


if __name__ == "__main__":
  main()
