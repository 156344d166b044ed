"""Feature sets on disk: order, their data set, and the import of published files without unpickling."""

import io
import os
import pickle
import types

import numpy as np
import pytest

from tests.helpers import miniature
from vixml_jax import datasets
from vixml_jax.errors import InputError
from vixml_jax.images import feature_set
from vixml_jax.images.feature_set import features_folder, open_features, write_features
from vixml_jax.images.pickled_lists import read_lists
from vixml_jax.images.published_features import import_published

DIM = 6
COUNTS = {"train": 23, "test": 5, "labels": 9}


@pytest.fixture
def builder(tmp_path):
  raw = miniature.write_raw_folder(tmp_path / "raw", num_train=23, num_test=5, num_labels=9)
  return datasets.prepare("custom", raw, tmp_path / "data")


def _vectors(split, row):
  """Some float16 vectors of a row, as many as the row modulo 4."""
  rng = np.random.default_rng([len(split), row])
  return rng.normal(size=(row % 4, DIM)).astype(np.float16)


def _rows(split, start, stop):
  for row in range(start, stop):
    vectors = _vectors(split, row)
    yield 2 * np.arange(len(vectors), dtype=np.int32), vectors


@pytest.mark.parametrize("rows_per_shard", [50_000, 7])
def test_features_are_read_as_they_were_written(builder, tmp_path, monkeypatch, rows_per_shard):
  monkeypatch.setattr(feature_set, "ROWS_PER_SHARD", rows_per_shard)
  written = write_features(builder, tmp_path / "data", "tiny", {"dim": DIM, "variant": "none"}, _rows)
  found = open_features(builder, tmp_path / "data", "tiny")
  assert (found.dim, found.metadata) == (DIM, written.metadata)
  assert found.metadata["dataset"] == "custom" and found.metadata["rows"] == COUNTS
  assert found.builder.info.splits["train"].num_shards == (1 if rows_per_shard > 23 else 4)
  for split, count in COUNTS.items():
    lengths, values = zip(*found.split(split), strict=True)
    np.testing.assert_array_equal(np.concatenate(lengths), np.arange(count) % 4)
    expected = np.concatenate([_vectors(split, row) for row in range(count)])
    assert values[0].dtype == np.float16
    np.testing.assert_array_equal(np.concatenate(values), expected)


def test_blocks_of_rows_follow_one_another(builder, tmp_path, monkeypatch):
  monkeypatch.setattr("vixml_jax.datasets.records.ROWS_PER_READ", 10)
  found = write_features(builder, tmp_path / "data", "tiny", {"dim": DIM}, _rows)
  blocks = list(found.split("train"))
  assert [len(lengths) for lengths, _ in blocks] == [10, 10, 3]
  assert all(len(values) == lengths.sum() for lengths, values in blocks)
  np.testing.assert_array_equal(blocks[2][1], np.concatenate([_vectors("train", row) for row in (20, 21, 22)]))


def test_tfds_itself_reads_the_set(builder, tmp_path):
  found = write_features(builder, tmp_path / "data", "tiny", {"dim": DIM}, _rows)
  for row, example in enumerate(found.builder.as_data_source("train")):
    np.testing.assert_array_equal(example["features"], _vectors("train", row))
    assert example["slots"].tolist() == [0, 2, 4][: row % 4]


def test_features_of_other_raw_files_are_refused(builder, tmp_path):
  write_features(builder, tmp_path / "data", "tiny", {"dim": DIM}, _rows)
  raw = miniature.write_raw_folder(tmp_path / "other", num_train=23, num_test=5, num_labels=9, seed=1)
  (tmp_path / "data" / "custom").rename(tmp_path / "data" / "old")
  other = datasets.prepare("custom", raw, tmp_path / "data")
  with pytest.raises(InputError, match=r"other raw files than custom now has \(trn.json.gz, tst.json.gz differ\)"):
    open_features(other, tmp_path / "data", "tiny")


def test_missing_features_are_requested(builder, tmp_path):
  with pytest.raises(InputError, match=r"custom_features.tiny.1.0.0: no image features; make them with python -m"):
    open_features(builder, tmp_path / "data", "tiny")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b"])
def test_name_that_cannot_be_a_folder_is_refused(builder, tmp_path, name):
  with pytest.raises(InputError, match="choose another --name"):
    features_folder(builder, tmp_path, name)


def test_failed_writing_leaves_nothing_that_opens(builder, tmp_path):
  def broken(split, start, stop):
    yield from _rows(split, start, stop - 1)
    raise InputError("the end is missing")

  with pytest.raises(InputError, match="the end is missing"):
    write_features(builder, tmp_path / "data", "tiny", {"dim": DIM}, broken)
  with pytest.raises(InputError, match="no image features"):
    open_features(builder, tmp_path / "data", "tiny")
  assert write_features(builder, tmp_path / "data", "tiny", {"dim": DIM}, _rows).dim == DIM
  assert [path.name for path in features_folder(builder, tmp_path / "data", "tiny").parent.iterdir()] == ["1.0.0"]


# Published files.


def _objects(rows):
  array = np.empty(len(rows), object)
  array[:] = rows
  return array


def _save_map(path, array):
  np.save(path, array, allow_pickle=True)


def _publish(folder, maps=None, dim=DIM, images=40):
  """The six files, and the vectors by split."""
  folder.mkdir()
  vectors = {}
  for split, count in COUNTS.items():
    rng = np.random.default_rng(count)
    vectors[split] = rng.normal(size=(images, dim)).astype(np.float32)
    np.save(folder / f"{miniature.SPLIT_NAMES[split]}_embs_imgs_3_1152_siglip2.npy", vectors[split])
    rows = [rng.integers(-1, images, 3).tolist()[: 1 + row % 3] for row in range(count)]
    _save_map(folder / f"{split}_imgs_384_3_map.npy", (maps or {}).get(split, _objects(rows)))
  return vectors


def test_published_features_are_those_that_numpy_reads(builder, tmp_path):
  vectors = _publish(tmp_path / "published")
  found = import_published(builder, tmp_path / "data", tmp_path / "published")
  assert found.dim == DIM and found.metadata["preprocessing"] == "published"
  for split, count in COUNTS.items():
    rows = np.load(tmp_path / "published" / f"{split}_imgs_384_3_map.npy", allow_pickle=True)
    examples = list(found.builder.as_data_source(split))
    assert len(examples) == count
    for images, example in zip(rows, examples, strict=True):
      slots = [slot for slot, image in enumerate(images) if image >= 0]
      assert example["slots"].tolist() == slots
      expected = vectors[split][[images[slot] for slot in slots]].astype(np.float16)
      np.testing.assert_array_equal(example["features"], expected)
    assert found.metadata["num_images"][split] == sum(image >= 0 for images in rows for image in images)


def test_published_features_are_imported_once(builder, tmp_path):
  _publish(tmp_path / "published")
  folder = features_folder(builder, tmp_path / "data", "published")
  import_published(builder, tmp_path / "data", tmp_path / "published")
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  import_published(builder, tmp_path / "data", tmp_path / "published")
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  vectors = tmp_path / "published" / "tst_embs_imgs_3_1152_siglip2.npy"
  np.save(vectors, np.load(vectors) + 1)
  with pytest.raises(InputError, match="has features with another checkpoint_sha256; choose another --name"):
    import_published(builder, tmp_path / "data", tmp_path / "published")


@pytest.mark.parametrize(
  "maps, line",
  [
    ({"train": _objects([[0]] * 22)}, "train_imgs_384_3_map.npy: 22 rows, but the train split has 23"),
    ({"labels": _objects([[0]] * 8 + [[3, 40]])}, "labels_imgs_384_3_map.npy: row 8 has image 40, but .* 0 to 39"),
    ({"test": _objects([[0]] * 4 + [[-2]])}, "test_imgs_384_3_map.npy: row 4 has image -2"),
    ({"test": _objects([[0]] * 4 + [["a"]])}, "test_imgs_384_3_map.npy: it has a value that is not an integer"),
    ({"test": _objects([[0]] * 4 + [[[1]]])}, "test_imgs_384_3_map.npy: it has a value that is not an integer"),
    ({"test": _objects([[0]] * 4 + [[None]])}, "test_imgs_384_3_map.npy: it has a value that is not an integer"),
    ({"test": _objects([[0]] * 4 + [[2**80]])}, "test_imgs_384_3_map.npy: not an .npy file with lists of integers"),
    ({"test": _objects([[0]] * 4 + [{}])}, "test_imgs_384_3_map.npy: it has the instruction EMPTY_DICT"),
    ({"test": np.zeros(5)}, "test_imgs_384_3_map.npy: it has a value that is not an integer"),
    ({"test": np.zeros((5, 1, 1), int)}, "test_imgs_384_3_map.npy: its array of shape"),
  ],
)
def test_map_that_does_not_fit_is_refused(builder, tmp_path, maps, line):
  _publish(tmp_path / "published", maps)
  with pytest.raises(InputError, match=line):
    import_published(builder, tmp_path / "data", tmp_path / "published")
  assert not features_folder(builder, tmp_path / "data", "published").exists()


def test_published_file_that_is_missing_or_damaged_is_named(builder, tmp_path):
  folder = tmp_path / "published"
  _publish(folder)
  vectors = folder / "trn_embs_imgs_3_1152_siglip2.npy"
  whole = vectors.read_bytes()
  for content, line in (
    (whole[:200], "trn_embs.*: not a readable .npy file of numbers"),
    (_npy(np.full((40, DIM), 1e6)), "trn_embs.*: rows .* have values that are not finite or exceed float16"),
    (_npy(np.full((40, DIM + 1), 1.0)), "features of the splits have different sizes"),
    (_npy(np.full((40, DIM), 1)), "has shape .* and type int64"),
  ):
    vectors.write_bytes(content)
    with pytest.raises(InputError, match=line):
      import_published(builder, tmp_path / "data", folder)
  vectors.unlink()
  with pytest.raises(InputError, match="trn_embs_imgs_3_1152_siglip2.npy: missing"):
    import_published(builder, tmp_path / "data", folder)


def _npy(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


# Maps as numpy may have written them.
MAPS = {
  "lists": _objects([[1, 2, 300], [-1], [], [70_000, 2**40]]),
  "bare numbers": _objects([5, -1, [2, 3]]),
  "tuples": _objects([(1, 2), (3,), ()]),
  "numpy numbers": _objects([[np.int64(4), np.int32(-1)], [np.uint8(200)]]),
  "arrays": _objects([np.array([1, 2], np.int16), np.array([-1]), np.array([3], ">i4")]),
  "equal counts": np.array([[1, 2], [3, -1], [4, 5]], object),
  "equal counts, plain": np.array([[1, 2], [3, -1], [4, 5]]),
  "a plain column": np.array([1, -1, 2]),
  "the same list twice": _objects([[1, 2]] * 3),
  "many": _objects([list(range(i, i + i % 4)) for i in range(3000)]),
  "none": _objects([]),
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", MAPS)
def test_lists_are_read_as_numpy_reads_them(tmp_path, name, protocol):
  array = MAPS[name]
  path = tmp_path / "map.npy"
  with path.open("wb") as file:
    if array.dtype == object:
      np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
      pickle.dump(array, file, protocol=protocol)
    else:
      np.save(file, array)
  expected = [
    [int(image) for image in np.atleast_1d(np.asarray(row, object))] for row in np.load(path, allow_pickle=True)
  ]
  rows = read_lists(path)
  assert rows.values.dtype == np.int64
  assert [row.tolist() for row in rows] == expected


def test_pickles_of_old_numpy_are_read(tmp_path):
  path = tmp_path / "map.npy"
  _save_map(path, MAPS["lists"])
  content = path.read_bytes()
  # numpy 1 wrote protocol 3 and called its modules otherwise.
  text = pickle.dumps(MAPS["lists"], 3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
  assert b"numpy.core.multiarray" in text
  path.write_bytes(content[: content.index(b"\n") + 1] + text)
  assert [row.tolist() for row in read_lists(path)] == MAPS["lists"].tolist()


class _Calls:
  """Pickles as a call."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call

  def __call__(self):
    """pickle wants what is called to be callable."""


def _raw(name, module, *arguments):
  """Protocol 0 to 2 text that calls module.name."""
  return (
    b"\x80\x02c"
    + f"{module}\n{name}\n".encode()
    + b"("
    + b"".join(b"X" + len(a).to_bytes(4, "little") + a.encode() for a in arguments)
    + b"tR."
  )


def _attacks(marker):
  """Pickles that would make the file `marker` or reach for what could; by name."""
  shell, python = f"touch {marker}", f"__import__('pathlib').Path({str(marker)!r}).touch()"
  getter = _Calls(getattr, _Calls(__import__, "os"), "system")
  return {
    "os.system": pickle.dumps(_Calls(os.system, shell)),
    "os.system, protocol 2": _raw("system", "os", shell),
    "posix.system within a list": pickle.dumps(_objects([[1], [_Calls(os.system, shell)]])),
    "builtins.eval": pickle.dumps(_Calls(eval, python)),
    "builtins.exec": pickle.dumps(_Calls(exec, python)),
    "builtins.open": pickle.dumps(_Calls(open, str(marker), "w")),
    "getattr": pickle.dumps(getter),
    "a chain of calls": pickle.dumps(_Calls(getter, shell)),
    "numpy.load": pickle.dumps(_Calls(np.load, str(marker))),
    "numpy.fromfile": pickle.dumps(_Calls(np.fromfile, str(marker))),
    "numpy.save": pickle.dumps(_Calls(np.save, str(marker), 0)),
    "numpy.memmap": pickle.dumps(_Calls(np.memmap, str(marker), "u1", "w+", 0, (4,))),
    "a module of numpy": _raw("exec_command", "numpy.distutils.exec_command", shell),
    "numpy's own eval": _raw("safe_eval", "numpy.lib.utils", shell),
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__dict__\x93.",
    "dotted module": b"\x80\x04\x8c\x0dnumpy.ndarray\x8c\x05dtype\x93.",
    "instance": b"(X\x02\x00\x00\x00idios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00ido.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "calls ndarray": b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",
    "calls a list": b"\x80\x04](K\x01tR.",
    "builds upon a list": b"\x80\x04]}b.",
    "persistent id": b"\x80\x04Pname\n.",
    "extension": b"\x80\x02\x82\x01.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "empty stack": b"\x80\x04.",
    "no such memory": b"\x80\x04h\x05.",
    "append to a number": b"\x80\x04K\x01K\x02a.",
    "no end": pickle.dumps(MAPS["lists"])[:-1],
    "cut short": pickle.dumps(MAPS["lists"])[:60],
    "list of itself": b"\x80\x04]\x94h\x00a.",
    "a number of 4 GB": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "stored by columns": pickle.dumps(np.asfortranarray(MAPS["equal counts"])),
    "wrong state": pickle.dumps(MAPS["lists"]).replace(b"\x89]", b"\x88]", 1),
    "nothing": b"",
    "a set of types": pickle.dumps(types.SimpleNamespace(a=1)),
  }


@pytest.mark.parametrize("name", _attacks("marker"))
def test_malicious_or_broken_pickle_is_refused(tmp_path, name):
  marker, path = tmp_path / "marker", tmp_path / "map.npy"
  _save_map(path, MAPS["lists"])
  header = path.read_bytes().index(b"\n") + 1
  path.write_bytes(path.read_bytes()[:header] + _attacks(marker)[name])
  with pytest.raises(InputError, match="map.npy: "):
    read_lists(path)
  assert not marker.exists()


def test_the_attacks_are_attacks(tmp_path):
  attacks = _attacks(tmp_path / "marker")
  for name in (
    "os.system",
    "os.system, protocol 2",
    "posix.system within a list",
    "a chain of calls",
    "builtins.eval",
    "numpy.save",
  ):
    pickle.loads(attacks[name])
    made = [path for path in tmp_path.iterdir() if path.name.startswith("marker")]
    assert made, name
    made[0].unlink()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x10\x00__import__('os')"])
def test_file_that_is_not_npy_is_refused(tmp_path, content):
  (tmp_path / "map.npy").write_bytes(content)
  with pytest.raises(InputError, match=r"map.npy: not an .npy file with lists of integers"):
    read_lists(tmp_path / "map.npy")
  with pytest.raises(InputError, match="none.npy: cannot be read"):
    read_lists(tmp_path / "none.npy")
