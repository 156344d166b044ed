"""The module of `examples/` gives texts, images and both the embeddings of this package in sentence-transformers."""

import importlib.util
import io

import numpy as np
from PIL import Image
import pytest
from sentence_transformers import SentenceTransformer

from tests.helpers.repository import ROOT
from vixml_jax.inference.loading import load_predictor


@pytest.fixture(scope="module")
def example():
  spec = importlib.util.spec_from_file_location(
    "vixml_module", ROOT / "examples" / "sentence_transformers" / "vixml_module.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_texts_images_and_both_have_our_embeddings(example, with_images, tmp_path):
  options = dict(image_checkpoint=str(with_images.tower))
  model = SentenceTransformer(modules=[example.VixmlModule(with_images.workdir, **options)])
  query = next(query for query in with_images.queries if len(query.get("images", [])) == 2)
  text, images = query["title"], [Image.open(io.BytesIO(content)) for content in query["images"]]
  images[1].save(tmp_path / "image.png")
  given = [
    (text, {"title": text}),
    (images[0], {"title": "", "images": images[:1]}),
    (str(tmp_path / "image.png"), {"title": "", "images": images[1:]}),
    ({"text": text, "image": images[0]}, {"title": text, "images": images[:1]}),
    ({"text": text, "image": images}, {"title": text, "images": images}),
  ]
  wanted = load_predictor(with_images.workdir, **options).encode([ours for _, ours in given])
  assert model.get_embedding_dimension() == wanted.shape[1]
  found = model.encode([theirs for theirs, _ in given])  # A batch of several kinds.
  cosines = (found * wanted).sum(1)
  print("cosines to ours:", cosines)
  np.testing.assert_allclose(cosines, 1, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
  for (theirs, _), row in zip(given, wanted, strict=True):  # Each kind alone.
    np.testing.assert_allclose(model.encode(theirs), row, atol=2e-5)
  different = wanted @ wanted.T
  assert different[np.triu_indices(len(given), 1)].min() < 0.999
  with pytest.raises(ValueError, match="chat messages are not supported"):
    model.encode([{"role": "user", "content": text}])
  with pytest.raises(NotImplementedError, match="keep the workdir"):
    model.save_pretrained(str(tmp_path / "saved"))


def test_a_model_of_texts_takes_texts_only(example, texts_only):
  model = SentenceTransformer(modules=[example.VixmlModule(texts_only.workdir)])
  texts = [query["title"] for query in texts_only.queries[:5]]
  np.testing.assert_allclose(model.encode(texts), texts_only.embeddings("test_queries")[:5], atol=2e-5)
  with pytest.raises(ValueError, match="image"):
    model.encode([Image.new("RGB", (8, 8))])


def test_a_folder_cannot_name_the_class_without_remote_code(tmp_path):
  """The reason why images are not in an exported folder."""
  (tmp_path / "modules.json").write_text(
    '[{"idx": 0, "name": "0", "path": "", "type": "vixml_jax.inference.predictor.Predictor"}]'
  )
  with pytest.raises(ValueError, match="trust_remote_code"):
    SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
