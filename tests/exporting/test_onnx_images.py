"""An exported ONNX folder gives texts with images our embeddings, by the code of its own model card."""

import dataclasses
import io
import json
import re

import jax
import numpy as np
from PIL import Image
import pytest

from tests.helpers.tiny_workdirs import exported, tiny_config, write_workdir
from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.images.preprocess import big_vision
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.trained_encoder import load_trained_encoder

pytest.importorskip("onnx", reason="needs onnx: pip install -c constraints.txt -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -c constraints.txt -e '.[onnx]'")

TEMPLATES = ["V E", "I V T2 E", "T E I V"]


def run_card(folder, monkeypatch):
  """Runs the code of the model card and returns its names."""
  monkeypatch.chdir(folder)
  names = {}
  exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1], names)
  return names


def compare(name, found, wanted, least):
  cosines = (found * wanted).sum(1)
  print(f"{name}: cosine to ours {cosines.mean():.6f} on average, at least {cosines.min():.6f}")
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
  assert cosines.min() > least


@pytest.mark.parametrize("dtype,least", [("float32", 0.99999), ("int8", 0.98)])
def test_images_become_features_and_embeddings_as_in_the_run(dtype, least, with_images, tmp_path, monkeypatch):
  folder = exported(with_images.workdir, "onnx", tmp_path / "out", dtype=dtype)
  names = run_card(folder, monkeypatch)
  predictor = load_predictor(with_images.workdir)
  queries = [
    {"title": query["title"], "content": query.get("content", ""), "images": query.get("images", [])}
    for query in with_images.queries
  ]
  assert {len(query["images"]) for query in queries} == {0, 1, 2, 3}  # The run reads two at most.
  found = names["encode"](
    [
      (
        f"{query['title']} {query['content']}",
        names["image_features"]([Image.open(io.BytesIO(image)) for image in query["images"][:2]])
        if query["images"]
        else names["no_images"],
      )
      for query in queries
    ]
  )
  compare(dtype, found, predictor.encode(queries), least)
  without = predictor.encode([query | {"images": []} for query in queries])
  assert (found * without).sum(1).min() < 0.98, "images change the embeddings"
  example = [{"title": "arrow up"}, {"title": "cloud", "images": [Image.new("RGB", (64, 64), "navy")]}]
  compare(f"{dtype}, example of the card", names["embeddings"], predictor.encode(example), least)
  clear = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 4)).astype(np.uint8))  # Partly transparent.
  found = names["encode"]([("cloud", names["image_features"]([clear]))])
  compare(f"{dtype}, transparent", found, predictor.encode([{"title": "cloud", "images": [clear]}]), least)
  info = json.loads((folder / "onnx.json").read_text())
  assert info["inputs"] == ["input_ids", "attention_mask", "image_features", "image_places"]
  assert info["images"]["tower"]["size"] == 8 and info["images"]["most"] == 2
  assert "This folder encodes texts with and without images" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method,template", [("early", template) for template in TEMPLATES] + [("late", "E")])
def test_features_enter_at_the_place_of_the_template(method, template, tmp_path, monkeypatch, caplog):
  config = tiny_config(tmp_path, "minilm-l6,images=3")
  config.fusion.update(dict(method=method, residual=0.0 if method == "late" else 0.5))
  config.prompt.template = template
  config.prompt.phrases.update(dict(T="sun", I="cloud map", T2="rain"))
  workdir = write_workdir(tmp_path / "run", config)
  encoder = load_trained_encoder(workdir, sharding.make_mesh(devices=jax.devices()[:1]))
  rng = np.random.default_rng(0)
  texts = ["arrow up", "cloud sun rain " * 30, "", "map"]
  features = [rng.normal(size=(count, 6)).astype(np.float16) for count in (2, 1, 0, 3)]
  with caplog.at_level("WARNING"):
    folder = exported(workdir, "onnx", tmp_path / "out")
  assert "no tower is recorded" in caplog.text and not (folder / "image_tower.onnx").exists()
  found = run_card(folder, monkeypatch)["encode"](
    [(text, vectors.astype(np.float32)) for text, vectors in zip(texts, features, strict=True)]
  )
  compare(f"{method}, {template}", found, encoder.embed(texts, features), 0.99999)
  assert (found * encoder.embed(texts)).sum(1)[[0, 1, 3]].max() < 0.999, "images change the embeddings"


def test_a_tower_that_moved_is_named_and_another_one_is_refused(with_images, tmp_path, caplog, monkeypatch):
  encoder = load_trained_encoder(with_images.workdir)
  gone = dataclasses.replace(encoder, image_origin=encoder.image_origin | {"checkpoint": "gone.npz"})
  gone.config.features.checkpoint = ""
  monkeypatch.setattr("vixml_jax.exporting.export.load_trained_encoder", lambda *_: gone)
  with caplog.at_level("WARNING"):
    folder = exported(with_images.workdir, "onnx", tmp_path / "without")
  assert "made by gone.npz, which does not exist here" in caplog.text
  assert json.loads((folder / "onnx.json").read_text())["images"]["tower"] is None
  given = exported(with_images.workdir, "onnx", tmp_path / "given", image_checkpoint=str(with_images.tower))
  assert (given / "image_tower.onnx").exists()
  changed = tmp_path / "other.npz"
  changed.write_bytes(with_images.tower.read_bytes() + b"0")
  with pytest.raises(InputError, match=r"is not the tower that made the image features tiny"):
    exported(with_images.workdir, "onnx", tmp_path / "wrong", image_checkpoint=str(changed))
  with pytest.raises(InputError, match=r"--image_checkpoint: --format=hf has no image tower"):
    exported(with_images.workdir, "hf", tmp_path / "hf", image_checkpoint=str(changed))


def test_the_resizing_of_the_card_is_that_of_big_vision():
  """The code for `preprocessing=big_vision`; the others are calls of Pillow's resize here as there."""
  rng = np.random.default_rng(0)
  for height, width in ((50, 31), (8, 8), (5, 90), (300, 200)):
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    image, size = Image.fromarray(pixels), 16
    scale = (image.width / size, 0, 0, 0, image.height / size, 0)
    found = image.transform((size, size), Image.Transform.AFFINE, scale, Image.Resampling.BILINEAR)
    difference = np.abs(np.int32(np.asarray(found)) - np.int32(big_vision(pixels, size)))
    assert difference.max() <= 1 and (difference == 0).mean() > 0.9
