"""Writes the embedded MM-Icons-9K from its published form: images as lossless WebP, the rest as is.

  python tools/encode_icons.py MM-Icons-9K vixml_jax/datasets/mm_icons_9k

Rows, order and split stay. PNG becomes lossless WebP in parquet (column `image`), and every image
is decoded again and compared pixel by pixel. Gzip files carry no time stamp, so that the
same input gives the same bytes.
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
_ROWS_A_GROUP = 2048
_NOTE = """
## In this repository
`tools/encode_icons.py` re-encoded the images as lossless WebP, in the column `image` instead of `png`; rows, order,
split, texts, labels and licenses are as above. `build_icons.py` and `baseline.py` are not part of this repository.
"""


def main() -> None:
  """Reads the flags and writes the folder."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("source", type=Path, help="folder of the published set")
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
  """Re-encodes the `png` column of a parquet file as `image`, lossless WebP, and checks it."""
  table = pq.read_table(source)
  images = [to_webp(png) for png in tqdm(table.column("png").to_pylist(), disable=None)]
  columns = [table.column("row"), table.column("slot"), pa.array(images, pa.binary())]
  # WebP does not compress further, and file offsets of rows do not deserve a dictionary.
  pq.write_table(
    pa.table(columns, schema=_SCHEMA),
    target,
    row_group_size=_ROWS_A_GROUP,
    compression="zstd",
    use_dictionary=False,
    write_statistics=False,
  )


def to_webp(png: bytes) -> bytes:
  """Lossless WebP of an image.

  Raises:
    ValueError: the WebP decodes to other pixels, or the image is not opaque.
  """
  image = Image.open(io.BytesIO(png))
  if "A" in image.getbands() or "transparency" in image.info:
    raise ValueError("the image is not opaque")
  pixels = image.convert("RGB")
  buffer = io.BytesIO()
  pixels.save(buffer, "WEBP", lossless=True, quality=100, method=6)
  decoded = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
  if not np.array_equal(decoded, np.asarray(pixels)):
    raise ValueError("the WebP decodes to other pixels")
  return buffer.getvalue()


if __name__ == "__main__":
  main()
