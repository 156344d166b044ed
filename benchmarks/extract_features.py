"""Compares the speed of our image encoding with that of transformers, on the same images in one process.

  .venv/bin/python benchmarks/extract_features.py --variant=siglip2_b32_256 --images=192
  .venv/bin/python benchmarks/extract_features.py --variant=siglip2_so400m14_384 --images=4096 --batch_size=128 \
      --no_transformers

Both sides start from JPEG bytes and end with pooled features: they decode, resize and run a tower with the same random
weights. Our side decodes in threads while the device computes. The side of transformers is the usual loop of processor
and model under `inference_mode`. The script prints images and floating-point operations per second of each side.
"""

import argparse
import io
import os
from pathlib import Path
import tempfile
import time

# Makes idle threads of torch sleep; otherwise they occupy the cores during our side's turn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from flax import nnx
import jax
import numpy as np
from PIL import Image
import torch
import transformers

from vixml_jax.images.tower import ImageTower
from vixml_jax.models.parameters import split_params
from vixml_jax.models.siglip import SiglipVision, define_siglip
from vixml_jax.weights.siglip import save_siglip, siglip_arguments


def parse_arguments() -> argparse.Namespace:
  """Returns the flags."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--variant", default="siglip2_b32_256", help="name of the tower, which gets random weights")
  parser.add_argument("--images", type=int, default=192, help="images per round")
  parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each side, alternating")
  parser.add_argument("--batch_size", type=int, default=64, help="images per step on both sides")
  parser.add_argument("--side", type=int, default=500, help="width and height of each JPEG in pixels")
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the computation on both sides"
  )
  parser.add_argument("--no_transformers", action="store_true", help="time only our side")
  return parser.parse_args()


def jpegs(count: int, side: int) -> list[bytes]:
  """Returns smooth random images, which compress like photographs."""
  rng = np.random.default_rng(0)
  found = []
  for _ in range(count):
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    found.append(buffer.getvalue())
  return found


def write_tower(variant: str, folder: Path) -> dict:
  """Writes random weights in the layout of Hugging Face; returns the arguments of the tower."""
  arguments = siglip_arguments(variant)
  params = split_params(SiglipVision(**arguments, rngs=nnx.Rngs(0)))[1]
  save_siglip(jax.device_get(params), folder, arguments)
  return arguments


class TransformersSide:
  """Processor and model of transformers, on the GPU if there is one."""

  def __init__(self, folder: Path, arguments: dict, batch_size: int, dtype: str):
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.model = (
      transformers.SiglipVisionModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(self.device).eval()
    )
    size = {"height": arguments["image_size"], "width": arguments["image_size"]}
    self.processor = transformers.SiglipImageProcessor(size=size, resample=Image.Resampling.BILINEAR)
    self.batch_size = batch_size
    self.dtype = getattr(torch, dtype)

  def encode(self, blobs: list[bytes]) -> np.ndarray:
    """Returns pooled features [images, F]."""
    outputs = []
    with torch.inference_mode():
      for start in range(0, len(blobs), self.batch_size):
        images = [Image.open(io.BytesIO(blob)).convert("RGB") for blob in blobs[start : start + self.batch_size]]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        outputs.append(self.model(pixels).pooler_output.float().cpu().numpy())
    return np.concatenate(outputs)


def flops_per_image(arguments: dict) -> float:
  """Returns the operations of the matrix products of one forward pass; a multiply-add counts as two."""
  tokens = (arguments["image_size"] // arguments["patch_size"]) ** 2
  width, mlp = arguments["embed_dim"], arguments["mlp_dim"]
  layer = 4 * tokens * width**2 + 2 * tokens * width * mlp + 2 * tokens**2 * width
  patches = tokens * 3 * arguments["patch_size"] ** 2 * width
  pooling = 2 * tokens * width**2 + 2 * width**2 + 2 * width * mlp + 2 * tokens * width
  return 2.0 * (arguments["num_layers"] * layer + patches + pooling)


def main() -> None:
  """Runs both sides alternately and prints their speed."""
  options = parse_arguments()
  blobs = jpegs(options.images, options.side)
  with tempfile.TemporaryDirectory() as folder:
    arguments = write_tower(options.variant, Path(folder))
    _, shapes, _ = define_siglip(arguments)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    print(
      f"{options.variant}: {count / 1e6:.1f} M parameters, {flops_per_image(arguments) / 1e9:.1f} GFLOP an image; "
      f"{options.images} JPEGs of {options.side} x {options.side}; {options.dtype}; {jax.devices()[0].device_kind}"
    )
    encoder = ImageTower(folder, None, "huggingface_bilinear", options.batch_size, options.dtype)
    theirs = (
      None if options.no_transformers else TransformersSide(Path(folder), arguments, options.batch_size, options.dtype)
    )

  def ours() -> np.ndarray:
    return encoder.encode(blobs)[0]

  sides = {"vixml_jax": ours} | ({} if theirs is None else {"transformers": lambda: theirs.encode(blobs)})
  outputs = {name: encode() for name, encode in sides.items()}  # The first call compiles.
  if theirs is not None:
    difference = np.linalg.norm(outputs["vixml_jax"] - outputs["transformers"])
    print(f"relative difference of the features {difference / np.linalg.norm(outputs['transformers']):.1e}")
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(options.rounds):
    for name, encode in sides.items():
      start = time.perf_counter()
      encode()
      seconds[name].append(time.perf_counter() - start)
  rates = {name: options.images / float(np.median(values)) for name, values in seconds.items()}
  for name, rate in rates.items():
    print(f"{name:13} {rate:8.1f} images/s   {rate * flops_per_image(arguments) / 1e12:8.3f} TFLOP/s")
  if theirs is not None:
    print(f"speed-up {rates['vixml_jax'] / rates['transformers']:.2f}")


if __name__ == "__main__":
  main()
