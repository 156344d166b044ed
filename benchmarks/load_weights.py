"""Measures the host memory that loading a checkpoint of several files into device arrays needs.

  .venv/bin/python -m benchmarks.load_weights

The script writes a random bfloat16 checkpoint in the layout of Qwen2.5-3B with a few layers and loads it in two
separate processes: through a copy on the host (`engine.apply`, then one device array after the other), and tensor by
tensor into the device arrays (`placement.place`, as training does). For each it prints the peak resident memory above
the memory before loading, and how much of that exceeds the bytes of the arrays, which on CPU devices are in the same
memory. The checkpoint is removed at the end.
"""

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

from flax import nnx
import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from vixml_jax import sharding
from vixml_jax.models.decoder import Decoder
from vixml_jax.models.parameters import split_params
from vixml_jax.weights import engine
from vixml_jax.weights.hf_folder import SafetensorsFolder, load_pretrained
from vixml_jax.weights.placement import place
from vixml_jax.weights.tables import QWEN2

WIDTHS: dict[str, Any] = dict(
  embed_dim=2048, num_heads=16, num_kv_heads=2, head_dim=128, mlp_dim=11008, rope_theta=1e6, qkv_bias=True
)
MIB = 2**20


def parse_arguments() -> argparse.Namespace:
  """Returns the flags."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--layers", type=int, default=6, help="number of layers, 154 MB each; Qwen2.5-3B has 36")
  parser.add_argument("--vocab_size", type=int, default=151936, help="number of word vectors, 4 KB each")
  parser.add_argument("--files", type=int, default=4, help="number of files of the checkpoint")
  parser.add_argument("--devices", type=int, default=1, help="number of CPU devices, which form the `fsdp` axis")
  parser.add_argument("--folder", type=Path, help="folder in which the temporary folder of the checkpoint is created")
  parser.add_argument("--way", choices=["host", "devices"], help="load `--folder` in this process; set by the script")
  return parser.parse_args()


def abstract(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns shapes and logical axes of the parameters of the decoder."""
  arguments = WIDTHS | dict(vocab_size=flags.vocab_size, num_layers=flags.layers, param_dtype="bfloat16")
  _, shapes, axes = split_params(nnx.eval_shape(lambda: Decoder(**arguments, rngs=nnx.Rngs(0))))
  return shapes, axes


def write_checkpoint(folder: Path, shapes: dict[str, Any], num_files: int) -> None:
  """Writes random tensors for every rule to the files, and their index."""
  flat = engine.flatten_tree(shapes)
  tensors = [
    (name, layout.theirs) for rule in QWEN2.rules for name, _, layout in engine.targets(rule, flat[rule.ours].shape)
  ]
  generator = np.random.default_rng(0)
  place_of = {}
  for number in range(num_files):
    file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
    mine = tensors[number::num_files]
    place_of |= {name: file for name, _ in mine}
    save_file(
      {name: generator.integers(2**16, size=shape, dtype=np.uint16).view(ml_dtypes.bfloat16) for name, shape in mine},
      folder / file,
    )
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place_of}))


def resident(key: str) -> int:
  """Returns resident bytes of this process: `VmRSS` is the current value, `VmHWM` the peak."""
  status = Path("/proc/self/status").read_text(encoding="ascii")
  return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{key}:"))


def load(flags: argparse.Namespace) -> dict[str, float]:
  """Loads the checkpoint in one way; returns bytes of the arrays, bytes at the peak, and seconds."""
  shapes, axes = abstract(flags)
  where = sharding.tree_shardings(sharding.make_mesh(data=1, fsdp=flags.devices), shapes, axes)
  jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # Excludes the memory of the backend.
  before, start = resident("VmRSS"), time.perf_counter()
  if flags.way == "host":
    params = jax.tree.map(sharding.to_global, load_pretrained(flags.folder, QWEN2, shapes), where)
  else:
    params = place(QWEN2, SafetensorsFolder(flags.folder), shapes, where)
  jax.block_until_ready(params)
  peak, seconds = resident("VmHWM"), time.perf_counter() - start
  return {"arrays": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "peak": peak - before, "seconds": seconds}


def main() -> None:
  """Writes the checkpoint, loads it in both ways and prints a table."""
  flags = parse_arguments()
  if flags.way:
    print(json.dumps(load(flags)))
    return
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={flags.devices}",
  }
  shapes, _ = abstract(flags)
  sizes = [
    2 * np.prod(layout.theirs, dtype=np.int64)
    for rule in QWEN2.rules
    for _, _, layout in engine.targets(rule, engine.flatten_tree(shapes)[rule.ours].shape)
  ]
  print(
    f"{sum(sizes) / MIB:.0f} MiB in {flags.files} files; largest tensors "
    + ", ".join(f"{size / MIB:.0f}" for size in sorted(set(sizes))[-2:])
    + f" MiB; {flags.devices} devices"
  )
  print("way       arrays MiB   peak MiB   above the arrays MiB   seconds")
  with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
    write_checkpoint(Path(folder), shapes, flags.files)
    for way in ("host", "devices"):
      command = [sys.executable, "-m", "benchmarks.load_weights", *sys.argv[1:], f"--folder={folder}", f"--way={way}"]
      found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
      arrays, peak = found["arrays"] / MIB, found["peak"] / MIB
      print(f"{way:<8} {arrays:>11.0f} {peak:>10.0f} {peak - arrays:>22.0f} {found['seconds']:>9.1f}")


if __name__ == "__main__":
  main()
