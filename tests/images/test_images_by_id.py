"""Images named by the uids of their items, as img2dataset downloads the published `img_urls.parquet`."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import miniature
from tests.helpers.damage import hide_a_page
from vixml_jax import datasets
from vixml_jax.errors import InputError
from vixml_jax.images import sources
from vixml_jax.images.extraction import prepare_features
from vixml_jax.models.vision import define_vision
from vixml_jax.weights.siglip import save_npz

LABELS = ["A", "B", "C"]
TRAIN = ["B", "X", "A", "B"]  # A uid may occur twice.
TEST = ["C", "Y"]
# id, key and image, in the order in which the downloads ended. The URLs of an id were listed in the order of the keys.
FIRST = [("B", "000000002", b"B third"), ("A", "000000003", b"A first"), ("B", "000000000", b"B first"),
         ("nobody", "000000004", b"other"), ("B", "000000001", None)]  # fmt: skip
SECOND = [("C", "000010001", b"C second"), ("A", "000010002", b"A second"), ("C", "000010000", b"C first")]

EXPECTED = {
  "train": [(0, 0, b"B first"), (0, 1, None), (0, 2, b"B third"), (2, 0, b"A first"), (2, 1, b"A second"),
            (3, 0, b"B first"), (3, 1, None), (3, 2, b"B third")],
  "test": [(0, 0, b"C first"), (0, 1, b"C second")],
  "labels": [(0, 0, b"A first"), (0, 1, b"A second"), (1, 0, b"B first"), (1, 1, None), (1, 2, b"B third"),
             (2, 0, b"C first"), (2, 1, b"C second")],
}  # fmt: skip


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("set")
  (folder / "raw").mkdir()
  query = {"title": "t", "content": "", "target_ind": [0], "target_rel": [1.0]}
  miniature.write_lines(folder / "raw" / "lbl.json.gz", [{"uid": u, "title": "t", "content": ""} for u in LABELS])
  for split, uids in (("trn", TRAIN), ("tst", TEST)):
    miniature.write_lines(folder / "raw" / f"{split}.json.gz", [{"uid": uid} | query for uid in uids])
  return datasets.prepare("custom", folder / "raw", folder / "data")


def _write(path, records, **columns):
  path.parent.mkdir(parents=True, exist_ok=True)
  ids, keys, blobs = zip(*records, strict=True)
  table = {"id": ids, "url": ["http"] * len(ids), "key": keys, "jpg": pa.array(blobs, pa.binary())} | columns
  pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path)
  return path


def _images(source):
  return sorted(
    (tuple(image) for _, piece in source.read(range(source.num_parts)) for image in piece), key=lambda image: image[:2]
  )


@pytest.mark.parametrize("images_per_part", [1, 3, 2048])
@pytest.mark.parametrize("place", ["", "/*.parquet"])
def test_images_come_to_the_rows_with_their_uid_in_the_order_of_the_urls(
  builder, tmp_path, monkeypatch, images_per_part, place
):
  monkeypatch.setattr(sources, "IMAGES_PER_PART", images_per_part)
  _write(tmp_path / "photos" / "00000.parquet", FIRST)
  _write(tmp_path / "photos" / "00001.parquet", SECOND)
  (tmp_path / "photos" / "00000_stats.json").touch()
  found = sources.open_sources(f"{tmp_path}/photos{place}", builder)
  for split, images in EXPECTED.items():
    assert _images(found[split]) == images
    alone = [piece for part in range(found[split].num_parts) for piece in found[split].read([part])]
    assert sum(len(piece) for _, piece in alone) == len(images)


def test_without_keys_images_are_in_the_order_of_the_records(builder, tmp_path):
  path = _write(tmp_path / "photos.parquet", SECOND, key=None)
  found = sources.open_sources(str(path), builder)
  assert _images(found["test"]) == [(0, 0, b"C second"), (0, 1, b"C first")]


def test_ids_of_a_page_that_pyarrow_skips_are_not_left_out(builder, tmp_path):
  path = _write(tmp_path / "photos.parquet", SECOND, key=None)
  hide_a_page(path)
  with pytest.raises(InputError, match=r"photos.parquet: not a readable parquet file \(its pages have 0 of the 3 rows"):
    sources.open_sources(str(path), builder)


def test_ids_may_be_numbers(builder, tmp_path):
  path = tmp_path / "photos.parquet"
  pq.write_table(pa.table({"id": pa.array([1, 2], pa.int64()), "jpg": pa.array([b"1", b"2"], pa.binary())}), path)
  with pytest.raises(InputError, match="no id in these files is a uid of custom; check column id"):
    sources.open_sources(str(path), builder)


def test_features_are_made_from_images_by_id(tmp_path, monkeypatch):
  """The whole command: the features of an item are those of its images, in the order of their slots."""
  raw = miniature.write_raw_folder(tmp_path / "raw", num_train=12, num_test=6, num_labels=8, images=True)
  builder = datasets.prepare("custom", raw, tmp_path / "data")
  rng, tower = np.random.default_rng(0), str(tmp_path / "tower.npz")
  shapes = define_vision(dict(image_size=8, patch_size=4, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16))[1]
  save_npz(jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes), tower)
  wanted = prepare_features(builder, tmp_path / "data", tower, name="own")
  records = []
  for prefix in sources.PREFIXES.values():
    uids = [line["uid"] for line in miniature.read_lines(raw / f"{prefix}.json.gz")]
    for image in pq.read_table(raw / f"{prefix}_images.parquet").to_pylist():
      records.append((uids[image["row"]], f"{len(records):09d}", image["png"]))
  order = rng.permutation(len(records))
  _write(tmp_path / "photos" / "00000.parquet", [records[i] for i in order])
  found = prepare_features(builder, tmp_path / "data", tower, name="by_id", images=str(tmp_path / "photos"))
  for split in sources.PREFIXES:
    for (lengths, values), (other_lengths, others) in zip(found.split(split), wanted.split(split), strict=True):
      np.testing.assert_array_equal(lengths, other_lengths)
      np.testing.assert_array_equal(values, others)
      assert len(values) > 2 and len(np.unique(values, axis=0)) == len(values)


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"jpg": None}, r"has URLs and no images; download them with img2dataset \(docs/images.md\), keeping id"),
    ({"id": None}, "columns must be id and one of png, .*; found 'url', 'key', 'jpg'"),
    ({"id": ["A", None, "B"]}, "column id has 1 records without an id"),
    ({"jpg": ["a", "b", "c"]}, "column jpg has type string; it must have the encoded images"),
  ],
)
def test_unusable_files_are_named(builder, tmp_path, columns, message):
  path = _write(tmp_path / "photos" / "00000.parquet", SECOND, **columns)
  with pytest.raises(InputError, match=message) as caught:
    sources.open_sources(str(path.parent), builder)
  assert str(caught.value).startswith(f"{path}: ")
