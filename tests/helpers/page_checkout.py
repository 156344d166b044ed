"""A copy of this checkout in which every command of the pages is small: data sets, encoders, image towers, schedules.

The commands are those of the pages, and so are the files that they name. Only what they read is small: each config
passes through `shrunk`, the data sets have the rows of a miniature, and the folders and files that a reader brings
(`DIR`, `products.csv`, `q.jsonl`, ...) are written here.
"""

import csv
import json
import os
from pathlib import Path
import shutil
import subprocess
import sysconfig
import venv

import jax
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers import tiny_towers
from tests.helpers.documents import ROOT
from tests.helpers.miniature import SPLIT_NAMES, read_lines, write_lines, write_raw_folder
from tests.helpers.miniature_runs import load_config, write_encoder
from tests.helpers.page_sizes import ENCODERS, shrunk
from vixml_jax.models.vision import define_vision
from vixml_jax.run import named_configs
from vixml_jax.weights.siglip import save_npz

_COPIED = ("vixml_jax", "configs", "benchmarks", "launch", "tools", "examples", "docs", "requirements")
_COPIED_FILES = ("Makefile", "constraints.txt", "setup.cfg", "setup.py", "pyproject.toml")
_ROWS = {"train": 160, "test": 20, "labels": 24}
# Name of a tower on the hub -> the small one that has its folder.
_HUB_TOWERS = {"openai/clip-vit-large-patch14": "clip and text", "facebook/dinov2-base": "dinov2"}
# A tower of the width that features of a checkpoint have, and little else.
_TOWERS = {"siglip2_b16_256.npz": 768, "siglip2_so400m14_384.npz": 1152, "tower.npz": 1152}
_STAMPS = ("-torch", "", "-test", "-docs", "-bench", "-bench-gpu", "-coverage", "-supply", "-quickstart")

# Programs of bash that commands are run through, or that pages call.
PROGRAMS = {
  "vixml": 'exec python -m vixml_jax "$@"',
  # start_server COMMAND...: starts it instead of the one that it started before, and waits until it is ready.
  "start_server": """
    if [[ -f server.pid ]]; then kill "$(< server.pid)" && tail --pid="$(< server.pid)" -f /dev/null; fi
    "$@" --port="$PORT" > server.log 2>&1 &
    echo $! > server.pid
    until curl -sf "http://127.0.0.1:$PORT/readyz"; do kill -0 $! || { cat server.log; exit 1; }; sleep 0.2; done""",
  # must_say WORDS COMMAND...: the command fails and says these words.
  "must_say": """
    words=$1; shift
    output=$("$@" 2>&1) && { echo "$output"; echo "it did not fail"; exit 1; }
    echo "$output"; grep -qF -- "$words" <<< "$output" """,
  "img2dataset": 'exec python -m tests.helpers.local_img2dataset "$@"',
}


class PageCheckout:
  """A checkout as a reader has it after the quickstart.

  Attributes:
    folder: Its root.
  """

  def __init__(self, folder: Path):
    self.folder = folder

  @classmethod
  def make(cls, folder: Path) -> "PageCheckout":
    """Copies this checkout, writes the small inputs, and trains the runs that pages use and no page trains."""
    checkout = cls(folder)
    folder.mkdir()
    for name in _COPIED:
      shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _COPIED_FILES:
      shutil.copy2(ROOT / name, folder)
    (folder / "tests").symlink_to(ROOT / "tests")
    checkout._install()
    checkout._shrink()
    checkout._write_inputs()
    checkout.run("make quickstart\nfor name in NAME A B C; do cp -r runs/quickstart runs/$name; done")
    return checkout

  def copy(self, folder: Path) -> "PageCheckout":
    """Returns a copy in another folder."""
    shutil.copytree(self.folder, folder, symlinks=True)
    return PageCheckout(folder)

  def run(self, code: str, **variables: str) -> str:
    """Runs code of bash in the root with the environment active, and returns what it printed.

    Raises:
      AssertionError: A command failed.
    """
    path = f"{self.folder / 'programs'}:{self.folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    small = {
      "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
      "PYTHONWARNINGS": "ignore",
      "PYTHONPATH": str(self.folder),
      "WANDB_MODE": "offline",
      "PIP_NO_INDEX": "1",
    }
    log = self.folder / "output"
    with log.open("w") as output:  # A pipe would stay open as long as a server.
      done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=self.folder,
        env=os.environ | small | {"PATH": path} | variables,
        stdout=output,
        stderr=subprocess.STDOUT,
        timeout=900,
      )
    printed = log.read_text("utf-8", "replace")
    assert done.returncode == 0, f"status {done.returncode} of\n{code}\n{printed}"
    return printed

  def stop_server(self) -> None:
    """Stops the server that a page has started."""
    if (self.folder / "server.pid").exists():
      self.run('! kill "$(< server.pid)" || tail --pid="$(< server.pid)" -f /dev/null')

  def _install(self) -> None:
    venv.create(self.folder / ".venv", with_pip=False)
    site = next((self.folder / ".venv" / "lib").glob("python*")) / "site-packages"
    # The packages of this environment, except compilers for accelerators.
    (site / "all.pth").write_text(
      f"{sysconfig.get_path('purelib')}\nimport sys; sys.modules.update(libtpu=None, jax_cuda12_plugin=None)\n"
    )
    for stamp in _STAMPS:
      (self.folder / ".venv" / f".installed{stamp}").touch()
    (self.folder / "programs").mkdir()
    for name, code in PROGRAMS.items():
      path = self.folder / "programs" / name
      path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{code}\n")
      path.chmod(0o755)

  def _shrink(self) -> None:
    for name in named_configs.config_names():
      with (self.folder / "configs" / f"{name}.py").open("a") as file:
        file.write("\n\nfrom tests.helpers.page_sizes import shrunk\n\nget_config = shrunk(get_config)\n")
    own = (self.folder / "configs" / "custom.py").read_text("utf-8")  # X.py stands for a config of the reader.
    own = own.replace("  return config\n", '  config.dataset.raw_dir = "DIR"\n  return config\n')
    (self.folder / "configs" / "X.py").write_text(own, "utf-8")
    with (self.folder / "vixml_jax" / "datasets" / "builders.py").open("a") as file:
      file.write(f"\n\nEXPECTED_COUNTS.update(dict.fromkeys(EXPECTED_COUNTS, {_ROWS}))\n")

  def _write_inputs(self) -> None:
    folder = self.folder
    raw = write_raw_folder(folder / "DIR", **{f"num_{split}": rows for split, rows in _ROWS.items()}, images=True)
    labels = [{"uid": "tag/arrow_up", "title": "arrow up", "content": ""}, *read_lines(raw / "lbl.json.gz")[1:]]
    write_lines(raw / "lbl.json.gz", labels)
    embedded = folder / "vixml_jax" / "datasets" / "mm_icons_9k"
    shutil.copytree(raw, embedded, dirs_exist_ok=True)
    shutil.copytree(raw, folder / "raw" / "lf_amazon_titles_131k")
    for name in ("DIR", "raw/features"):
      _write_published(folder / name)
    for name in ENCODERS:
      config = shrunk(lambda variant: load_config("lf_amazon_titles_131k", variant))(f"encoder={name}")
      write_encoder(folder / config.encoder.pretrained, config.encoder)
    shutil.copytree(folder / "encoders" / "36x2048", folder / "Qwen2.5-3B")
    for name, dim in _TOWERS.items():
      sizes = dict(image_size=16, patch_size=8, num_layers=1, embed_dim=dim, num_heads=1, mlp_dim=8)
      tower = folder.parent / name  # Copies of the checkout share it.
      save_npz(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), define_vision(sizes)[1]), tower)
      (folder / name).symlink_to(tower)
    for name, kind in _HUB_TOWERS.items():
      tiny_towers.write_tower(folder / name, kind)
    queries = read_lines(raw / "trn.json.gz")
    with (folder / "products.csv").open("w", newline="") as file:
      rows = [[each["title"], "|".join(labels[i]["title"] for i in each["target_ind"])] for each in queries[:80]]
      csv.writer(file).writerows([["text", "labels"], *rows])
    for name in ("q.jsonl", "queries.jsonl"):
      _write_lines(folder / name, [{"title": each["title"]} for each in queries[:3]])
    _write_lines(folder / "new.jsonl", [{"uid": "tag/otter", "title": "otter", "positives": ["otter swimming"]}])
    (folder / "gone.txt").write_text("label/3\n")
    _write_lines(folder / "categories.jsonl", [{"uid": "label/2", "categories": ["animals"]}])
    _picture(0).save(folder / "wifi.png")
    self._write_urls(queries)

  def _write_urls(self, queries: list[dict]) -> None:
    """Writes pictures, and the tables of their addresses that img2dataset reads."""
    (self.folder / "pictures").mkdir()
    urls = [f"pictures/{row}.png" for row in range(len(queries))]
    for row, url in enumerate(urls):
      _picture(row).save(self.folder / url)
    names, uids = [each["title"] for each in queries], [each["uid"] for each in queries]
    tags = ["|".join(each["title"].split()[:2]) for each in queries]
    rows = list(range(len(queries)))
    for name, columns in {
      "products": {"image_url": urls, "name": names, "tags": tags},
      "img_urls": {"url": urls, "id": uids},
      "trn_urls": {"url": urls, "row": rows, "slot": [0] * len(rows)},
    }.items():
      pq.write_table(pa.table(columns), self.folder / f"{name}.parquet")


def _picture(seed: int) -> Image.Image:
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


def _write_lines(path: Path, records: list[dict]) -> None:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_published(folder: Path) -> None:
  """Writes features of one image for every row, as the files of the paper have them."""
  folder.mkdir(exist_ok=True)
  for split, rows in _ROWS.items():
    vectors = np.random.default_rng(rows).normal(size=(rows, 1152)).astype(np.float32)
    np.save(folder / f"{SPLIT_NAMES[split]}_embs_imgs_3_1152_siglip2.npy", vectors)
    places = np.empty(rows, object)
    places[:] = [[row] for row in range(rows)]
    np.save(folder / f"{split}_imgs_384_3_map.npy", places, allow_pickle=True)
