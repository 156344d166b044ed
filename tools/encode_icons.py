"""Converts the published data set MM-Icons-9K to its embedded form, with images as lossless WebP.

  python tools/encode_icons.py MM-Icons-9K vixml_jax/datasets/mm_icons_9k

Rows, their order and the split do not change. PNG images become lossless WebP in the parquet column `image`; each is
decoded again and compared pixel by pixel. Gzip files are written without a time stamp, so that the same input gives the
same bytes.
"""

import argparse
import gzip
import io
from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

_SCHEMA = pa.schema([("row", pa.int32()), ("slot", pa.int8()), ("image", pa.binary())])
_ROWS_PER_GROUP = 2048
_NOTE = """
## In this repository
`tools/encode_icons.py` re-encoded the images as lossless WebP, in the column `image` instead of `png`; rows, order,
split, texts, labels and licenses are as above. `build_icons.py` and `baseline.py` are not part of this repository.
"""


def main() -> None:
  """Reads the arguments and writes the folder."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("source", type=Path, help="folder of the published data set")
  parser.add_argument("target", type=Path, help="folder to write")
  arguments = parser.parse_args()
  arguments.target.mkdir(parents=True, exist_ok=True)
  for name in ("trn.json.gz", "tst.json.gz", "lbl.json.gz"):
    text = gzip.decompress((arguments.source / name).read_bytes())
    (arguments.target / name).write_bytes(gzip.compress(text, 9, mtime=0))
  (arguments.target / "LICENSES").mkdir(exist_ok=True)
  licenses = [path.relative_to(arguments.source) for path in arguments.source.glob("LICENSES/*")]
  names = ("filter_labels_train.txt", "filter_labels_test.txt", "stats.json")
  for name in (*names, *licenses):
    shutil.copyfile(arguments.source / name, arguments.target / name)
  readme = (arguments.source / "README.md").read_text("utf-8")
  (arguments.target / "README.md").write_text(readme + _NOTE, "utf-8")
  for name in ("trn_images.parquet", "tst_images.parquet"):
    encode_images(arguments.source / name, arguments.target / name)


def encode_images(source: Path, target: Path) -> None:
  """Writes the column `png` of a parquet file as the column `image` of another one, in lossless WebP."""
  table = pq.read_table(source)
  images = [to_webp(png) for png in tqdm(table.column("png").to_pylist(), disable=None)]
  columns = [table.column("row"), table.column("slot"), pa.array(images, pa.binary())]
  # WebP does not compress further, and a dictionary of unique images would only cost space.
  pq.write_table(
    pa.table(columns, schema=_SCHEMA),
    target,
    row_group_size=_ROWS_PER_GROUP,
    compression="zstd",
    use_dictionary=False,
    write_statistics=False,
  )


def to_webp(png: bytes) -> bytes:
  """Converts an image to lossless WebP.

  Raises:
    ValueError: The image is not opaque, or the WebP does not decode to the same pixels.
  """
  image = Image.open(io.BytesIO(png))
  if "A" in image.getbands() or "transparency" in image.info:
    raise ValueError("the image is not opaque")
  pixels = image.convert("RGB")
  buffer = io.BytesIO()
  pixels.save(buffer, "WEBP", lossless=True, quality=100, method=6)
  decoded = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
  if not np.array_equal(decoded, np.asarray(pixels)):
    raise ValueError("the WebP does not decode to the same pixels")
  return buffer.getvalue()


if __name__ == "__main__":
  main()
