"""Row of image features: from JPEG files in memory to pooled features of a SigLIP tower with random weights."""

from concurrent.futures import ThreadPoolExecutor
import io
import os
from pathlib import Path

from flax import nnx
import jax
import numpy as np
from PIL import Image

from benchmarks.bench.data import temporary_folder
from benchmarks.bench.harness import OURS, Check, Cost, Side, Started, Work
from vixml_jax.images.tower import ImageTower
from vixml_jax.models.parameters import split_params
from vixml_jax.models.vision import VisionTransformer
from vixml_jax.weights.siglip import save_siglip, siglip_arguments

_LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 5e-2}
_TINY = dict(num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64, image_size=32, patch_size=16)
_PATCH_OF_NOISE = 12  # Pixels of the noise that is enlarged, so that a file has the size of one of a photograph.


def images(size: str) -> Work:
  """Image features: decoding and resizing JPEG files, and a SigLIP tower."""
  variant, count, batch, side, dtype = {
    "tiny": ("siglip2_b32_256", 4, 2, 48, "float32"),
    "cpu": ("siglip2_b32_256", 64, 32, 500, "float32"),
    "gpu": ("siglip2_so400m14_384", 512, 128, 500, "bfloat16"),
  }[size]
  arguments = siglip_arguments(variant) | (_TINY if size == "tiny" else {})
  folder = temporary_folder()
  save_siglip(jax.device_get(split_params(VisionTransformer(**arguments, rngs=nnx.Rngs(0)))[1]), folder, arguments)
  blobs = _jpegs(count, side)

  def ours() -> Started:
    tower = ImageTower(str(folder), None, "huggingface_bilinear", batch, dtype)
    return Started(lambda _: tower.encode(blobs)[0])

  def check(ours: np.ndarray, theirs: np.ndarray) -> Check:
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
    return Check(difference <= _LARGEST_DIFFERENCE[dtype], f"features differ by {difference:.1e}")

  packages = ("torch", "transformers")
  strongest = "torch, compiled, threads decode"
  return Work(
    what=f"{count:,} JPEG files of {side} x {side} pixels, {variant} with random weights, {dtype}",
    unit="images",
    units=count,
    sides=[
      Side(OURS, ours),
      Side("transformers", lambda: _transformers(folder, blobs, batch, dtype), packages),
      Side(strongest, lambda: _transformers(folder, blobs, batch, dtype, True, size != "tiny"), packages),
    ],
    check=check,
    cost=Cost("flops", count * flops_per_image(arguments), dtype),
  )


def _jpegs(count: int, side: int) -> list[bytes]:
  """Returns smooth random images, which compress like photographs."""
  rng = np.random.default_rng(0)
  found = []
  for _ in range(count):
    small = Image.fromarray(rng.integers(0, 256, (_PATCH_OF_NOISE, _PATCH_OF_NOISE, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    found.append(buffer.getvalue())
  return found


def _transformers(
  folder: Path, blobs: list[bytes], batch: int, dtype: str, threads: bool = False, compiled: bool = False
) -> Started:
  """Processor and model of transformers, on the GPU if there is one; with threads, images are decoded beside it."""
  import torch
  import transformers

  from benchmarks.bench.torch_device import device

  model = transformers.SiglipVisionModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device()).eval()
  run = torch.compile(model, dynamic=False) if compiled else model
  pixels = {"height": model.config.image_size, "width": model.config.image_size}
  processor = transformers.SiglipImageProcessor(size=pixels, resample=Image.Resampling.BILINEAR)

  def prepare(part: list[bytes]) -> torch.Tensor:
    opened = [Image.open(io.BytesIO(blob)).convert("RGB") for blob in part]
    return processor(opened, return_tensors="pt")["pixel_values"]

  def encode(_: int) -> np.ndarray:
    parts = [blobs[start : start + batch] for start in range(0, len(blobs), batch)]
    with torch.inference_mode(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
      prepared = pool.map(prepare, parts) if threads else map(prepare, parts)
      outputs = [run(part.to(device(), getattr(torch, dtype))).pooler_output.float() for part in prepared]
      return torch.cat(outputs).cpu().numpy()

  return Started(encode)


def flops_per_image(arguments: dict[str, int]) -> float:
  """Returns the operations of the matrix products of one forward pass; a multiply-add counts as two."""
  tokens = (arguments["image_size"] // arguments["patch_size"]) ** 2
  width, mlp = arguments["embed_dim"], arguments["mlp_dim"]
  layer = 4 * tokens * width**2 + 2 * tokens * width * mlp + 2 * tokens**2 * width
  patches = tokens * 3 * arguments["patch_size"] ** 2 * width
  pooling = 2 * tokens * width**2 + 2 * width**2 + 2 * width * mlp + 2 * tokens * width
  return 2.0 * (arguments["num_layers"] * layer + patches + pooling)
