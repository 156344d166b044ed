"""Features from every source of images, resumed and by several processes, equal those of a plain forward pass."""

import io
import json
import logging
from pathlib import Path
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import miniature
from tests.helpers.damage import hide_a_page
from tests.helpers.miniature_runs import ROOT, run_commands
from vixml_jax import datasets
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.images import decoding, sources
from vixml_jax.images.extraction import prepare_features
from vixml_jax.images.feature_parts import FeatureParts
from vixml_jax.images.tower import ImageTower
from vixml_jax.models.parameters import merge_params
from vixml_jax.models.vision import define_vision
from vixml_jax.process_share import ProcessShare
from vixml_jax.weights.siglip import save_npz

# The miniature's images have 8 x 8 pixels, so that nothing is resized.
TOWER = dict(image_size=8, patch_size=4, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)


def _params(seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), define_vision(TOWER)[1])


def _write_tower(path, seed=0):
  save_npz(_params(seed), path)
  return str(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A prepared set with images and a tower; nothing writes into it."""
  folder = tmp_path_factory.mktemp("shared")
  raw = miniature.write_raw_folder(folder / "raw", num_train=40, num_test=12, num_labels=20, images=True)
  return datasets.prepare("custom", raw, folder / "data"), _write_tower(folder / "tiny.npz")


@pytest.fixture(scope="module")
def expected(shared):
  """split -> (lengths, vectors), by a plain forward pass over what Pillow decodes."""
  blobs = {
    split: [[blob for _, blob in record.images()] for batch in Records(shared[0], split).batches() for record in batch]
    for split in sources.PREFIXES
  }
  pixels = [
    np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for rows in blobs.values() for row in rows for blob in row
  ]
  forward = jax.jit(merge_params(define_vision(TOWER)[0], _params()))
  vectors = np.asarray(forward(jnp.asarray(np.stack(pixels) / 127.5 - 1, jnp.float32)))
  lengths = {split: np.array([len(row) for row in rows]) for split, rows in blobs.items()}
  parts = np.split(vectors, np.cumsum([counts.sum() for counts in lengths.values()])[:-1])
  return {split: (lengths[split], part) for split, part in zip(lengths, parts, strict=True)}


def _all(features, split):
  lengths, values = zip(*features.split(split), strict=True)
  return np.concatenate(lengths), np.concatenate(values)


def _check(features, expected):
  for split, (lengths, vectors) in expected.items():
    found_lengths, found = _all(features, split)
    np.testing.assert_array_equal(found_lengths, lengths)
    np.testing.assert_allclose(found.astype(np.float32), vectors, atol=4e-3, rtol=1e-3)


@pytest.mark.parametrize("part_rows, batch_size", [(1024, 64), (7, 8), (7, 3)])
def test_features_are_those_of_a_plain_forward_pass(shared, expected, tmp_path, monkeypatch, part_rows, batch_size):
  monkeypatch.setattr(sources, "ROWS_PER_PART", part_rows)
  features = prepare_features(shared[0], tmp_path, shared[1], batch_size=batch_size)
  _check(features, expected)
  assert features.builder.info.full_name == "custom_features/tiny/1.0.0"
  assert features.metadata["preprocessing"] == "big_vision" and features.metadata["dtype"] == "float32"
  assert features.metadata["num_images"] == {split: int(sum(lengths)) for split, (lengths, _) in expected.items()}
  assert sum(features.metadata["num_bad_images"].values()) == 0
  folder = tmp_path / "custom_features" / "tiny"
  assert sorted(path.name for path in folder.iterdir()) == ["1.0.0", "bad_images.jsonl"]


def test_bfloat16_is_near_float32_and_recorded(shared, expected, tmp_path):
  features = prepare_features(shared[0], tmp_path, shared[1], dtype="bfloat16")
  assert features.metadata["dtype"] == "bfloat16"
  _, found = _all(features, "train")
  difference = np.abs(found - expected["train"][1]).max()
  assert 1e-4 < difference < 0.1


def _records(builder, split):
  """row, slot, bytes of every image."""
  rows = (record for batch in Records(builder, split).batches() for record in batch)
  return [(row, slot, blob) for row, record in enumerate(rows) for slot, blob in record.images()]


def _write_parquet(path, records, blob_column="png", schema=None, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  rows, slots, blobs = zip(*records, strict=True) if records else ((), (), ())
  table = pa.table(
    {"row": pa.array(rows, pa.int32()), "slot": pa.array(slots, pa.int64()), blob_column: pa.array(blobs, pa.binary())}
  )
  pq.write_table(table, path, **options)


def _write_files(folder, builder):
  for split, prefix in sources.PREFIXES.items():
    (folder / prefix).mkdir(parents=True)
    (folder / prefix / ".DS_Store").touch()
    for row, slot, blob in _records(builder, split):
      single = slot == 0 and row % 2
      (folder / prefix / (f"{row}.PNG" if single else f"{row:05d}_{slot}.png")).write_bytes(blob)
  return str(folder)


def _write_single_parquets(folder, builder):
  for split, prefix in sources.PREFIXES.items():
    _write_parquet(folder / f"{prefix}_images.parquet", _records(builder, split), row_group_size=7)
  return str(folder)


def _write_shuffled_parquets(folder, builder):
  rng = np.random.default_rng(0)
  for split, prefix in sources.PREFIXES.items():
    records = _records(builder, split)
    order = rng.permutation(len(records))
    for number, part in enumerate(np.array_split(order, 3)):
      _write_parquet(folder / f"{prefix}-{number}.parquet", [records[i] for i in part], "bytes", row_group_size=3)
  return f"{folder}/{{split}}-*.parquet"


def _write_img2dataset(folder, builder):
  """Laid out as img2dataset's ParquetSampleWriter does: the columns kept, then url, key, status, ..., jpg."""
  for split, prefix in sources.PREFIXES.items():
    (folder / prefix).mkdir(parents=True)
    records = _records(builder, split)[::-1]
    for number in range(2):
      rows, slots, blobs = zip(*records[number::2], strict=True)
      count = len(rows)
      table = pa.table(
        {
          "row": pa.array(rows, pa.int64()),
          "slot": pa.array(map(str, slots), pa.string()),
          "url": ["http"] * count,
          "key": [f"{i:09d}" for i in range(count)],
          "status": ["success"] * count,
          "error_message": pa.array([None] * count, pa.string()),
          "jpg": pa.array(blobs, pa.binary()),
        }
      )
      pq.write_table(table, folder / prefix / f"{number:05d}.parquet")
      (folder / prefix / f"{number:05d}_stats.json").write_text("{}")
  return str(folder)


@pytest.mark.parametrize("write", [_write_files, _write_single_parquets, _write_shuffled_parquets, _write_img2dataset])
def test_every_source_gives_the_same_features(shared, expected, tmp_path, monkeypatch, write):
  monkeypatch.setattr(sources, "IMAGES_PER_PART", 5)
  monkeypatch.setattr(sources, "PER_READ", 4)
  source = write(tmp_path / "images", shared[0])
  features = prepare_features(shared[0], tmp_path / "data", shared[1], images=source, batch_size=16)
  _check(features, expected)


def _sources_of_part(builder, source, numbers):
  found = sources.open_sources(source, builder)["train"].read(numbers)
  return [(part, [image[:2] for image in piece]) for part, piece in found]


def test_parts_of_parquet_are_read_alone_or_together(shared, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "IMAGES_PER_PART", 5)
  monkeypatch.setattr(sources, "PER_READ", 4)
  source = _write_shuffled_parquets(tmp_path, shared[0])
  parts = range(sources.open_sources(source, shared[0])["train"].num_parts)
  together = _sources_of_part(shared[0], source, parts)
  alone = [piece for part in parts for piece in _sources_of_part(shared[0], source, [part])]
  assert alone == together and len({part for part, _ in together}) == len(parts) > 5
  assert sorted(image for _, piece in together for image in piece) == [
    image[:2] for image in _records(shared[0], "train")
  ]


def test_bad_images_are_left_out_counted_and_listed(shared, expected, tmp_path, caplog):
  records = _records(shared[0], "train")
  reasons = {1: decoding.DAMAGED, 4: decoding.NOT_AN_IMAGE, 5: decoding.EMPTY, 6: decoding.MISSING}
  broken = {1: records[1][2][:60], 4: b"404", 5: b"", 6: None}
  _write_parquet(
    tmp_path / "images" / "trn_images.parquet",
    [(row, slot, broken.get(i, blob)) for i, (row, slot, blob) in enumerate(records)],
  )
  with caplog.at_level(logging.INFO, "vixml_jax"):
    features = prepare_features(shared[0], tmp_path / "data", shared[1], images=str(tmp_path / "images"), batch_size=8)
  path = tmp_path / "data" / "custom_features" / "tiny" / "bad_images.jsonl"
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"split": "train", "row": records[i][0], "slot": records[i][1], "reason": reason} for i, reason in reasons.items()
  ]
  (warning,) = [
    record.message for record in caplog.records if record.levelname == "WARNING" and record.name.startswith("vixml_jax")
  ]
  assert warning == (
    f"4 of {len(records)} images have no features (1 missing, 1 no bytes, 1 {decoding.NOT_AN_IMAGE}, "
    f"1 {decoding.DAMAGED}); {path} lists them"
  )
  assert features.metadata["num_bad_images"] == {"train": 4, "test": 0, "labels": 0}
  good = [i for i in range(len(records)) if i not in reasons]
  lengths, found = _all(features, "train")
  np.testing.assert_array_equal(lengths, np.bincount([records[i][0] for i in good], minlength=40))
  np.testing.assert_allclose(found.astype(np.float32), expected["train"][1][good], atol=4e-3, rtol=1e-3)
  slots = np.concatenate([row["slots"] for row in features.builder.as_data_source("train")])
  assert slots.tolist() == [records[i][1] for i in good]
  assert all(not len(values) for _, values in features.split("test"))


def test_unreadable_file_is_a_bad_image(shared, tmp_path):
  (tmp_path / "images" / "lbl" / "3_0.png").mkdir(parents=True)
  features = prepare_features(shared[0], tmp_path, shared[1], images=str(tmp_path / "images"))
  assert features.metadata["num_bad_images"]["labels"] == 1
  assert decoding.UNREADABLE in (tmp_path / "custom_features" / "tiny" / "bad_images.jsonl").read_text()


def test_finished_features_are_not_made_again(shared, tmp_path, monkeypatch):
  prepare_features(shared[0], tmp_path, shared[1])
  monkeypatch.setattr(ImageTower, "__init__", None)
  features = prepare_features(shared[0], tmp_path, shared[1])
  assert features.dim == 8
  other = _write_tower(tmp_path / "tiny.npz", seed=1)
  with pytest.raises(InputError, match="has features with another checkpoint_sha256; choose another --name"):
    prepare_features(shared[0], tmp_path, other)
  with pytest.raises(InputError, match="has features with another preprocessing"):
    prepare_features(shared[0], tmp_path, shared[1], preprocessing="huggingface")
  with pytest.raises(InputError, match="has features with another images"):
    prepare_features(shared[0], tmp_path, shared[1], images=_write_files(tmp_path / "images", shared[0]))


def test_weights_that_give_nan_are_refused(shared, tmp_path):
  params = _params()
  params["head"]["probe"][:] = np.nan
  save_npz(params, tmp_path / "nan.npz")
  with pytest.raises(InputError, match="nan.npz: its features are not finite or exceed float16"):
    prepare_features(shared[0], tmp_path, str(tmp_path / "nan.npz"))


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from vixml_jax import datasets
from vixml_jax.images import sources
from vixml_jax.images.feature_parts import FeatureParts
from vixml_jax.images.extraction import prepare_features
from vixml_jax.images.feature_parts import FeatureParts
sources.ROWS_PER_PART = 8
write = FeatureParts.write
def slow(self, split, number, part):
  if (split, number) == ("train", 3):
    print("halfway", file=sys.stderr, flush=True)
    time.sleep(60)
  write(self, split, number, part)
FeatureParts.write = slow
builder = datasets.open_dataset("custom", sys.argv[2])
prepare_features(builder, sys.argv[3], sys.argv[4], batch_size=8)
"""


def test_killed_extraction_keeps_what_it_finished(shared, expected, tmp_path, monkeypatch, caplog):
  builder, tower = shared
  process = subprocess.Popen(
    [sys.executable, "-c", KILLED, ROOT, Path(builder.data_dir).parent.parent, tmp_path, tower],
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    assert any(line == "halfway\n" for line in process.stderr)
    process.send_signal(signal.SIGKILL)
  monkeypatch.setattr(sources, "ROWS_PER_PART", 8)
  encoded = []
  encode_parts = ImageTower.encode_parts

  def counted(self, source, numbers, name):
    for number, part in encode_parts(self, source, numbers, name):
      encoded.append((name, number, len(part.rows)))
      yield number, part

  monkeypatch.setattr(ImageTower, "encode_parts", counted)
  with caplog.at_level(logging.INFO, "vixml_jax"):
    features = prepare_features(builder, tmp_path, tower, batch_size=8)
  _check(features, expected)
  assert "3 parts were finished by an earlier run and are kept" in caplog.text
  assert [part[:2] for part in encoded] == [
    ("train", 3),
    ("train", 4),
    ("test", 0),
    ("test", 1),
    ("labels", 0),
    ("labels", 1),
    ("labels", 2),
  ]
  total = sum(lengths.sum() for lengths, _ in expected.values())
  assert sum(count for *_, count in encoded) == total - expected["train"][0][:24].sum()


@pytest.mark.parametrize(
  "case, line",
  [
    ("image twice", "train images: row 3, slot 0 occurs twice; give each image of a row its own slot"),
    ("row out of range", "trn_images.parquet: record 1: row 40, slot 0 is out of range; rows are 0 to 39"),
    ("slot below 0", "record 1: row 3, slot -1 is out of range"),
    ("no row", "record 1: row None, slot 0 is out of range"),
    ("text for a row", "trn_images.parquet: near record 0: row and slot must be integers"),
    ("no image column", "columns must be row, slot and one of png, jpg, .*; found 'row', 'slot', 'photo'"),
    ("column of text", "column png has type string; it must have the encoded images"),
    ("not parquet", "trn_images.parquet: not a readable parquet file"),
    ("cut short", "trn_images.parquet: not a readable parquet file"),
    ("hidden page", r"trn_images.parquet: not a readable parquet file \(its pages have 0 of the 1 rows"),
    ("empty folder", "no images found; give a folder with trn, tst or lbl"),
    ("name of a file", "1-2.png: the name of an image file must be ROW_SLOT.EXT or ROW.EXT"),
    ("row of a file", "40_0.png: row 40, slot 0 is out of range; rows are 0 to 39"),
  ],
)
def test_unusable_images_are_named(shared, tmp_path, case, line):
  folder = tmp_path / "images"
  folder.mkdir()
  path = folder / "trn_images.parquet"
  blob = _records(shared[0], "train")[0][2]
  if case in ("image twice", "row out of range", "slot below 0", "no row"):
    second = {"image twice": (3, 0), "row out of range": (40, 0), "slot below 0": (3, -1), "no row": (None, 0)}[case]
    _write_parquet(path, [(3, 0, blob), (*second, blob)])
  elif case == "text for a row":
    pq.write_table(pa.table({"row": ["first"], "slot": [0], "png": [blob]}), path)
  elif case == "no image column":
    _write_parquet(path, [(3, 0, blob)], "photo")
  elif case == "column of text":
    pq.write_table(pa.table({"row": [3], "slot": [0], "png": ["text"]}), path)
  elif case == "not parquet":
    path.write_bytes(b"PAR2" * 10)
  elif case == "cut short":
    _write_parquet(path, [(3, 0, blob)])
    path.write_bytes(path.read_bytes()[:-100])
  elif case == "hidden page":
    _write_parquet(path, [(3, 0, blob)])
    hide_a_page(path)
  elif "file" in case:
    (folder / "trn").mkdir()
    (folder / "trn" / ("1-2.png" if case == "name of a file" else "40_0.png")).write_bytes(blob)
  with pytest.raises(InputError, match=line):
    prepare_features(shared[0], tmp_path, shared[1], images=str(folder))
  assert not (tmp_path / "custom_features" / "tiny" / "1.0.0").exists()


# Commands. Name -> arguments after those of the data, and a part of the one line on stderr.
_COMMAND_LINES = {
  "no checkpoint": ([], "--checkpoint"),
  "no such checkpoint": (["--checkpoint={folder}/none.npz"], "{folder}/none.npz"),
  "no npz": (["--checkpoint={folder}/text.npz"], "{folder}/text.npz"),
  "another variant": (["--checkpoint={folder}/tiny.npz", "--variant=siglip2_b32_256"], "siglip2_b32_256"),
  "unknown variant": (["--checkpoint={folder}/tiny.npz", "--variant=siglip9"], "siglip9"),
  "unknown preprocessing": (["--checkpoint={folder}/tiny.npz", "--preprocessing=crop"], "--preprocessing=crop"),
  "no such images": (["--checkpoint={folder}/tiny.npz", "--images={folder}/nothing"], "{folder}/nothing"),
  "empty batch": (["--checkpoint={folder}/tiny.npz", "--batch_size=0"], "batch_size 0"),
  "name with a slash": (["--checkpoint={folder}/tiny.npz", "--name=a/b"], "a/b"),
  "nothing published": (["--published={folder}"], "trn_embs_imgs_3_1152_siglip2.npy"),
  "published and checkpoint": (["--published={folder}", "--checkpoint=x.npz"], "--published and --checkpoint"),
}
_GOOD = ["--checkpoint={folder}/tiny.npz", "--batch_size=16", "--name=mine"]


@pytest.fixture(scope="module")
def command_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("command")
  miniature.write_raw_folder(folder / "raw", num_train=12, num_test=4, num_labels=6, images=True)
  _write_tower(folder / "tiny.npz")
  (folder / "text.npz").write_text("none")
  return folder


@pytest.fixture(scope="module")
def results(command_folder):
  """Name -> exit status, stdout and stderr; each is started as `python -m` does."""
  datasets.prepare("custom", command_folder / "raw", command_folder / "data")
  data = [
    "--config=configs/custom.py",
    "--config.dataset.raw_dir={folder}/raw",
    "--config.dataset.data_dir={folder}/data",
  ]
  lines = {"good": _GOOD, "again": _GOOD} | {name: arguments for name, (arguments, _) in _COMMAND_LINES.items()}
  commands = {
    name: ["extract_features", *(part.format(folder=command_folder) for part in data + arguments)]
    for name, arguments in lines.items()
  }
  return run_commands(commands, command_folder)


def test_command_makes_features_once(results, command_folder):
  for name, line in (("good", "images/s"), ("again", "nothing to do")):
    status, stdout, stderr = results[name]
    assert (status, stdout) == (0, ""), stderr
    lines = stderr.splitlines()
    assert len(lines) == 1 and line in lines[0], stderr
  assert (command_folder / "data" / "custom_features" / "mine" / "1.0.0" / "dataset_info.json").is_file()


@pytest.mark.parametrize("name", _COMMAND_LINES)
def test_bad_command_is_one_line_and_status_1(name, results, command_folder):
  status, stdout, stderr = results[name]
  assert status == 1 and not stdout, stderr
  lines = stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), stderr
  assert _COMMAND_LINES[name][1].format(folder=command_folder) in lines[0]


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
jax.distributed.initialize(sys.argv[5], 2, int(sys.argv[6]))
from vixml_jax import datasets
from vixml_jax.images import sources
from vixml_jax.images.feature_parts import FeatureParts
from vixml_jax.images.extraction import prepare_features
from vixml_jax.images.feature_parts import FeatureParts
sources.ROWS_PER_PART = 8
write = FeatureParts.write
def counted(self, split, number, part):
  print("made", split, number, flush=True)
  write(self, split, number, part)
FeatureParts.write = counted
builder = datasets.open_dataset("custom", sys.argv[2])
prepare_features(builder, sys.argv[3], sys.argv[4], batch_size=8)
"""


@pytest.mark.slow
def test_two_processes_share_the_parts(shared, expected, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  builder, tower = shared
  command = [sys.executable, "-c", TWO_PROCESSES, ROOT, Path(builder.data_dir).parent.parent, tmp_path, tower, address]
  processes = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(2)]
  outputs = [process.communicate(timeout=300)[0].splitlines() for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  made = [[line for line in lines if line.startswith("made ")] for lines in outputs]  # Gloo prints as well.
  # Five parts of train, two of test, three of labels.
  assert [len(lines) for lines in made] == [6, 4] and len({*made[0], *made[1]}) == 10
  _check(prepare_features(builder, tmp_path, tower), expected)


def test_processes_that_are_not_joined_share_the_parts_in_any_number(shared, expected, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(sources, "ROWS_PER_PART", 8)
  made, write = [], FeatureParts.write

  def killed_at_the_third(self, split, number, part):
    if len(made) == 2:
      raise KeyboardInterrupt
    made.append((split, number))
    write(self, split, number, part)

  monkeypatch.setattr(FeatureParts, "write", killed_at_the_third)
  with pytest.raises(KeyboardInterrupt):
    prepare_features(shared[0], tmp_path, shared[1], batch_size=8, share=ProcessShare(1, 2))
  monkeypatch.setattr(FeatureParts, "write", lambda self, *part: (made.append(part[:2]), write(self, *part))[1])
  with caplog.at_level(logging.INFO, "vixml_jax"):
    for index in (2, 0):
      assert prepare_features(shared[0], tmp_path, shared[1], batch_size=8, share=ProcessShare(index, 3)) is None
  assert "the process that finishes last writes" in caplog.text
  assert not (tmp_path / "custom_features" / "tiny" / "1.0.0").exists()
  features = prepare_features(shared[0], tmp_path, shared[1], batch_size=8, share=ProcessShare(1, 3))
  _check(features, expected)
  assert len(made) == len({*made}) == 10
