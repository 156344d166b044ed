"""The flags of img2dataset that pages use, for tables whose URLs are paths of files: it writes what img2dataset writes.

The columns are those of `img2dataset/downloader.py`: caption, the additional columns, url, key, status and the image.
"""

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
  """Reads the table of URLs in the flags, and writes the parquet file of their images."""
  parser = argparse.ArgumentParser(allow_abbrev=False)
  for name in ("url_list", "url_col", "output_folder"):
    parser.add_argument(f"--{name}", required=True)
  parser.add_argument("--input_format", choices=["parquet"], required=True)
  parser.add_argument("--output_format", choices=["parquet"], required=True)
  parser.add_argument("--caption_col")
  parser.add_argument("--save_additional_columns", type=json.loads, default=[])
  parser.add_argument("--resize_mode", choices=["no", "border"], default="border")
  parser.add_argument("--image_size", type=int, default=256)
  parser.add_argument("--skip_reencode", choices=["True", "False"], default="False")
  flags = parser.parse_args()
  rows = pq.read_table(flags.url_list)
  columns = {name: rows[name] for name in flags.save_additional_columns}
  if flags.caption_col:
    columns["caption"] = rows[flags.caption_col]
  urls = rows[flags.url_col].to_pylist()
  keys = [f"{row:09d}" for row in range(len(urls))]
  columns |= {"url": urls, "key": keys, "status": ["success"] * len(urls)}
  columns["jpg"] = pa.array([Path(url).read_bytes() for url in urls], pa.binary())
  folder = Path(flags.output_folder)
  folder.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), folder / "00000.parquet")
  (folder / "00000_stats.json").write_text("{}")


if __name__ == "__main__":
  main()
