"""The script that trains the quickstart's image tower, at a tiny size, and the tower that is shipped."""

import dataclasses
import io
from pathlib import Path
import re

import jax
import numpy as np
from PIL import Image
import pytest
import scipy.ndimage
import torch

from tests.helpers.miniature import write_raw_folder
from tests.helpers.miniature_runs import load_config, shrink
from tools import train_icon_tower as tool
from vixml_jax.datasets.prepared import prepare
from vixml_jax.files import sha256_of_file
from vixml_jax.images.tower import ImageTower
from vixml_jax.input.hold_out import hold_out
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.ragged import Ragged
from vixml_jax.weights.siglip import save_npz
from vixml_jax.weights.vision import load_tower

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "vixml_jax/datasets/mm_icons_9k/icon_tower.npz"
TINY = {"image_size": 16, "patch_size": 8, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32}
LABELS = 120


def make_icons(count=60, seed=0):
  """Icons whose single tag follows from the position of their ink; two images each."""
  rng = np.random.default_rng(seed)
  kinds = np.arange(count) % 4
  pixels = np.full((2 * count, 16, 16, 3), 255, np.uint8)
  for image in range(2 * count):
    row, column = divmod(kinds[image // 2], 2)
    pixels[image, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = rng.integers(0, 128, (8, 8, 1))
  none = Ragged.from_rows([[]] * count)
  return tool.Icons(
    [f"icon {row}" for row in range(count)],
    ["one", "two"] * (count // 2),
    Ragged.from_rows(kinds[:, None]),
    none,
    pixels,
    np.arange(2 * count) // 2,
  )


def unit_rows(count, dim, seed):
  vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def trained(seed, steps):
  recipe = tool.Recipe(steps, batch_size=16, learning_rate=1e-2, shift=1.0, log_every=50)
  names, sets, labels = unit_rows(60, 24, 1), unit_rows(2, 24, 3), unit_rows(LABELS, 24, 2)
  return tool.train(TINY, recipe, make_icons(), names, sets, labels, seed)


def test_training_reduces_the_loss_and_teaches_which_tag_an_image_has(capsys):
  params = trained(0, 150)
  losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
  assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]  # The loss of the names, which images do not show, remains.
  unseen = make_icons(40, seed=5)
  features = tool.mean_features(tool.features_of(params["tower"], TINY, unseen.pixels), unseen)
  labels = unit_rows(LABELS, 24, 2) @ np.asarray(params["text"])
  labels *= np.exp(params["log_scale"]) / np.linalg.norm(labels, axis=1, keepdims=True)
  prior = np.where(np.arange(LABELS) < 4, np.log(1 / 3), -5)
  one_each = dataclasses.replace(unseen, pixels=unseen.pixels[::2], rows=unseen.rows[::2])
  assert tool.rank_by_tower(features, labels, prior, one_each)["P@1"] > 90  # 25 by chance.


@pytest.mark.slow
def test_the_same_seed_trains_the_same_tower_and_another_seed_another():
  one, same, other = (jax.tree.leaves(trained(seed, 10)["tower"]) for seed in (0, 0, 1))
  assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
  assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_loss_is_binary_cross_entropy_over_all_pairs_divided_by_the_images():
  images, texts = unit_rows(5, 8, 0), unit_rows(7, 8, 1)
  targets = np.random.default_rng(2).random((5, 7)) < 0.3
  found = tool.sigmoid_loss(images, texts, targets, 9.0, -3.0)
  logits = torch.tensor(images @ texts.T * 9 - 3)
  wanted = (
    torch.nn.functional.binary_cross_entropy_with_logits(
      logits, torch.tensor(targets, dtype=torch.float32), reduction="sum"
    )
    / 5
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_images_are_warped_as_scipy_does_it():
  pixels = np.random.default_rng(0).random((2, 9, 9, 3)).astype(np.float32)
  shift, scale = np.array([[1.25, -2.0], [0.5, 3.0]]), np.array([[0.8, 1.3], [1.1, 1.0]])
  found = tool.warp(pixels, shift, scale)
  for image in range(2):
    offset = 4 + shift[:, image] - 4 * scale[:, image]
    for channel in range(3):
      wanted = scipy.ndimage.affine_transform(
        pixels[image, :, :, channel], scale[:, image], offset, order=1, mode="grid-constant"
      )
      np.testing.assert_allclose(found[image, :, :, channel], wanted, atol=1e-5)


def test_augmentation_keeps_white_ground_white_and_without_strength_changes_nothing():
  white = np.full((3, 16, 16, 3), 255, np.uint8)
  strong, none = tool.Recipe(1, shift=5.0, scale=1.5), tool.Recipe(1, shift=0.0, scale=1.0)
  np.testing.assert_array_equal(tool.augment(white, jax.random.key(0), strong), np.ones((3, 16, 16, 3)))
  pixels = make_icons().pixels[:3]
  plain = pixels.astype(np.float32) / 255 * 2 - 1
  np.testing.assert_allclose(tool.augment(pixels, jax.random.key(0), none), plain, atol=1e-5)
  moved = tool.augment(pixels, jax.random.key(0), strong)
  assert np.abs(moved - plain).max() > 0.5 and np.abs(moved).max() <= 1 + 1e-5


def test_every_image_is_seen_once_per_epoch():
  batches = list(tool.batches(12, tool.Recipe(6, batch_size=4), np.random.default_rng(0)))
  assert sorted(np.concatenate(batches[:3])) == sorted(np.concatenate(batches[3:])) == list(range(12))


def test_taking_icons_keeps_their_images_and_labels():
  icons = make_icons(6)
  icons.pixels[:, 0, 0, 0] = np.arange(12)
  part = icons.take(np.array([False, True, False, False, True, True]))
  assert part.titles == ["icon 1", "icon 4", "icon 5"] and part.sets == ["two", "one", "two"]
  np.testing.assert_array_equal(part.rows, [0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(part.pixels[:, 0, 0, 0], [2, 3, 8, 9, 10, 11])
  np.testing.assert_array_equal(part.labels.values, [1, 0, 1])


def test_tags_come_from_the_nearest_icons_by_name_and_image():
  training, icons = make_icons(80), make_icons(4)
  memory = tool.Vectors(unit_rows(80, 6, 0), unit_rows(80, 5, 1))
  vectors = tool.Vectors(unit_rows(4, 6, 2), unit_rows(4, 5, 3))
  found = tool.transfer_tags(memory, training, vectors, icons, LABELS, 0.5, 0.1)
  hits = []
  for query in range(4):
    similarity = vectors.text[query] @ memory.text.T + 0.5 * (vectors.image[query] @ memory.image.T)
    votes = np.zeros(LABELS)
    for neighbor in np.argsort(-similarity)[:50]:
      votes[training.labels[neighbor][0]] += np.exp(similarity[neighbor] / 0.1)
    hits.append(votes.argmax() == icons.labels[query][0])
  assert 0 < np.mean(hits) < 1
  assert found["P@1"] == 100 * np.mean(hits)


def test_the_name_of_an_image_is_ranked_among_the_distinct_names():
  names = np.eye(12, dtype=np.float32)
  titles = ["twin", *(f"name {row}" for row in range(10)), "twin"]
  names[11] = names[0]
  images = np.stack([names[0], names[1], -names[2], names[0] + 0.1 * names[3]])
  found = tool.retrieve_texts(images, names, titles, np.array([11, 1, 2, 3]))
  assert found == {"R@1": 50.0, "R@10": 75.0}


def test_only_training_icons_that_are_not_held_out_are_trained_on(tmp_path, monkeypatch):
  encoder = Path(shrink(load_config("custom", "encoder=minilm-l6"), tmp_path, "").encoder.pretrained)
  builder = prepare("custom", write_raw_folder(tmp_path / "raw", images=True), tmp_path / "data")
  read, given = [], {}

  class Watched(tool.Records):
    def __init__(self, builder, split):
      read.append(split)
      super().__init__(builder, split)

  def fake_train(arguments, recipe, icons, names, sets, labels, seed):
    given.update(titles=icons.titles, names=names)
    return tool.init_params(TINY, names.shape[1], jax.random.key(seed))

  monkeypatch.setattr(tool, "Records", Watched)
  monkeypatch.setattr(tool, "prepare", lambda *_: builder)
  monkeypatch.setattr(tool.source, "resolve", lambda _: encoder)
  monkeypatch.setattr(tool, "train", fake_train)
  monkeypatch.setattr(tool, "report", lambda *_: None)
  monkeypatch.setattr("sys.argv", ["train", f"--output={tmp_path / 'tower.npz'}", "--held_out=0.3"])
  tool.main()
  assert set(read) == {"train", "labels"}
  titles = [record.text(("title",)) for batch in tool.Records(builder, "train").batches() for record in batch]
  held_out = hold_out(Tokenizer(encoder, 32)(titles), 0.3, 0)
  assert 0 < held_out.sum() < len(titles)
  assert given["titles"] == [title for title, out in zip(titles, held_out, strict=True) if not out]
  assert len(given["names"]) == len(given["titles"])
  assert load_tower(tmp_path / "tower.npz")[1] == TINY


def test_features_are_those_that_the_package_extracts(tmp_path):
  tower = tool.init_params(TINY, 8, jax.random.key(0))["tower"]
  pixels = make_icons(2).pixels
  save_npz(tower, tmp_path / "tower.npz")
  images = []
  for image in pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    images.append(buffer.getvalue())
  features, _ = ImageTower(str(tmp_path / "tower.npz"), None, "big_vision", 4, "float32").encode(images)
  np.testing.assert_allclose(tool.features_of(tower, TINY, pixels), features, atol=2e-3, rtol=2e-3)


@pytest.fixture(scope="module")
def shipped():
  return load_tower(SHIPPED)


def test_the_shipped_tower_is_small_and_has_the_scripts_arguments(shipped):
  params, arguments = shipped
  assert SHIPPED.stat().st_size <= 4_000_000
  assert arguments == tool.ARGUMENTS
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_shipped_tower_is_the_one_that_is_documented():
  assert sha256_of_file(SHIPPED) in (ROOT / "docs/icon_tower.md").read_text("utf-8")
