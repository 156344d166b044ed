"""The encoder in int8: it answers as the trained one does, is made once, and refuses what it cannot do in one line."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.inference import quantized_encoder
from vixml_jax.inference.label_files import label_format
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.new_labels import embed_labels
from vixml_jax.onnx_models import quantization

pytest.importorskip("onnx", reason="needs onnx: pip install -c constraints.txt -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -c constraints.txt -e '.[onnx]'")

LEAST_COSINE = 0.98


def int8(workdir):
  return load_predictor(workdir, encoder="int8", mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def least_cosine(found, wanted):
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
  return np.sum(found * wanted, axis=1).min()


@pytest.fixture(scope="module")
def workdir(texts_only, tmp_path_factory):
  """Copy of the workdir with the encoder in int8."""
  copy = shutil.copytree(texts_only.workdir, tmp_path_factory.mktemp("int8") / "run")
  int8(copy)
  return copy


@pytest.fixture
def copy(workdir, tmp_path):
  """Copy that the test may damage."""
  return shutil.copytree(workdir, tmp_path / "run")


def test_queries_and_new_labels_have_nearly_the_embeddings_of_evaluation(texts_only, workdir):
  predictor, trained = int8(workdir), load_predictor(texts_only.workdir)
  queries = [{key: query[key] for key in ("title", "content")} for query in texts_only.queries]
  found = predictor.encode(queries)
  assert least_cosine(found, texts_only.embeddings("test_queries")) > LEAST_COSINE
  np.testing.assert_array_equal(predictor.encode(queries, whole_chunks=True), found)
  assert least_cosine(predictor.encode(queries[:1]), texts_only.embeddings("test_queries")[:1]) > LEAST_COSINE
  # The labels of the index stay those of training: scores are products with them.
  for row, answers in zip(found, predictor.predict(queries, k=5), strict=True):
    scores = texts_only.embeddings("labels") @ row
    np.testing.assert_allclose([answer.score for answer in answers], np.sort(scores)[::-1][:5], atol=2e-6)
  form = label_format(trained.encoder.config)
  labels = [form.parse({"uid": "new", "title": "cloud sun", "positives": ["rain", "map"]}, "line 1")]
  new, wanted = (embed_labels(made, labels).prototypes for made in (predictor, trained))
  assert least_cosine(new, wanted) > LEAST_COSINE


def test_images_are_encoded_as_well(with_images, tmp_path):
  predictor = int8(shutil.copytree(with_images.workdir, tmp_path / "run"))
  queries = [
    {key: query[key] for key in ("title", "content", "images") if key in query} for query in with_images.queries
  ]
  assert least_cosine(predictor.encode(queries), with_images.embeddings("test_queries")) > LEAST_COSINE
  trained = load_predictor(with_images.workdir)
  texts = [query["title"] for query in queries]
  assert least_cosine(predictor.encode(texts), trained.encode(texts)) > LEAST_COSINE


def test_the_model_is_made_once_and_compared_with_the_trained_encoder(copy, monkeypatch):
  info = json.loads((copy / "onnx/int8.json").read_text())
  assert info["cosine"]["texts"] == 24 and info["cosine"]["least"] > LEAST_COSINE
  monkeypatch.setattr(quantized_encoder, "to_int8", None)  # Would be called to make it.
  assert int8(copy).settings()["int8_sha256"] == info["sha256"]
  assert "int8_sha256" not in load_predictor(copy).settings()
  assert sorted(path.name for path in (copy / "onnx").iterdir()) == ["int8.json", "int8.onnx", "lock"]


def _truncate(folder):
  model = folder / "int8.onnx"
  model.write_bytes(model.read_bytes()[:-9])


def _flip(folder):
  content = bytearray((folder / "int8.onnx").read_bytes())
  content[len(content) // 2] ^= 1
  (folder / "int8.onnx").write_bytes(content)


def _other_checkpoint(folder):
  info = json.loads((folder / "int8.json").read_text())
  (folder / "int8.json").write_text(json.dumps(info | {"checkpoint": {"step": 1, "sha256": "0" * 64}}))


@pytest.mark.parametrize(
  "change,message",
  [
    (_truncate, "int8.onnx: is damaged"),
    (_flip, "int8.onnx: is damaged"),
    (lambda folder: (folder / "int8.onnx").unlink(), "int8.onnx"),
    (lambda folder: (folder / "int8.json").write_text("{"), "int8.json: is not JSON"),
    (_other_checkpoint, ""),
  ],
  ids=["truncated", "changed", "without model", "without info", "other checkpoint"],
)
def test_a_damaged_model_and_that_of_another_checkpoint_are_made_again(copy, change, message, caplog):
  files = [copy / "onnx/int8.onnx", copy / "onnx/int8.json"]
  before = [path.read_bytes() for path in files]
  change(copy / "onnx")
  int8(copy)
  assert [path.read_bytes() for path in files] == before
  assert message in caplog.text


def test_a_model_for_cpus_with_vnni_is_made_again_for_others_which_all_cpus_can_use(copy, monkeypatch):
  def bits():
    int8(copy)
    return json.loads((copy / "onnx/int8.json").read_text())["weight_bits"]

  for cpu, wanted in ((8, 8), (7, 7), (8, 7)):
    for module in (quantization, quantized_encoder):
      monkeypatch.setattr(module, "weight_bits", lambda cpu=cpu: cpu)
    (copy / "onnx/int8.json").unlink() if cpu == wanted == 8 else None
    assert bits() == wanted


def test_a_decoder_is_refused_in_one_line(adapters):
  with pytest.raises(InputError, match=r"with encoder\.architecture=decoder cannot be an ONNX model; .*") as caught:
    load_predictor(adapters.workdir, encoder="int8")
  assert "\n" not in str(caught.value)


def test_models_without_a_graph_are_refused_by_key(with_images, tmp_path):
  config = json.loads((with_images.workdir / "config.json").read_text())
  config["encoder"] |= {"pooling": "last"}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match=r"a model with encoder\.pooling=last cannot be an ONNX model"):
    load_predictor(tmp_path, encoder="int8")


def test_other_devices_other_types_and_absent_packages_are_refused(copy, monkeypatch):
  with pytest.raises(InputError, match="encoder=int4: must be int8"):
    load_predictor(copy, encoder="int4")
  monkeypatch.setitem(sys.modules, "onnxruntime", None)
  with pytest.raises(InputError, match=r"need the package onnxruntime, .*pip install 'vixml-jax\[onnx\]'"):
    int8(copy)
  monkeypatch.setattr(sharding, "platform_of", lambda mesh: "gpu")
  with pytest.raises(InputError, match=r"encoder=int8: runs on CPUs, but the devices are gpus; set JAX_PLATFORMS=cpu"):
    int8(copy)
