"""A trained workdir answers queries without its data, as its evaluation did; errors name what is missing or damaged."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from tests.helpers.damage import flip_a_bit
from vixml_jax import sharding
from vixml_jax.encoding import item_encoder
from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file
from vixml_jax.inference import trained_encoder
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.trained_encoder import load_trained_encoder
from vixml_jax.input.packing import pack
from vixml_jax.manifest import write_manifest
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import newest_checkpoint
from vixml_jax.search.retrieval_augmented import RetrievalSettings


@pytest.fixture(scope="module")
def predictor(texts_only):
  return load_predictor(texts_only.workdir)


@pytest.fixture(scope="module")
def viewer(with_images):
  return load_predictor(with_images.workdir)


@pytest.fixture
def copy(texts_only, tmp_path):
  """Copy of the workdir that the test may damage."""
  return shutil.copytree(texts_only.workdir, tmp_path / "run")


def precision_at_1(trained, predictions):
  return 100 * np.mean([row[0].id in positives for row, positives in zip(predictions, trained.positives, strict=True)])


def test_predictions_are_the_labels_of_highest_score_among_those_that_evaluation_saw(texts_only, predictor):
  queries = [{key: query[key] for key in ("title", "content")} for query in texts_only.queries]
  scores = texts_only.embeddings("test_queries") @ texts_only.embeddings("labels").T
  for row, found in zip(scores, predictor.predict(queries, k=5), strict=True):
    assert [label.id for label in found] == np.argsort(-row, kind="stable")[:5].tolist()
    np.testing.assert_allclose([label.score for label in found], np.sort(row)[::-1][:5], atol=2e-6)
    for label in found:
      assert (label.label, label.text) == (texts_only.labels[label.id]["uid"], texts_only.labels[label.id]["title"])


@pytest.mark.parametrize("augmented,prefix", [(False, ""), (True, "RA/")], ids=["plain", "augmented"])
def test_the_test_split_gives_the_metrics_that_training_printed(texts_only, augmented, prefix):
  predictor = load_predictor(texts_only.workdir, retrieval_augmented=augmented)
  if augmented:
    assert predictor.retrieval.lambda_ == texts_only.final["RA/lambda"]
    assert predictor.retrieval.temperature == texts_only.final["RA/temperature"]
  found = predictor.predict(texts_only.queries, k=3)
  assert precision_at_1(texts_only, found) == pytest.approx(texts_only.final[f"{prefix}P@1"])
  hits = [
    len({label.id for label in row} & set(positives))
    for row, positives in zip(found, texts_only.positives, strict=True)
  ]
  assert 100 * np.mean(hits) / 3 == pytest.approx(texts_only.final[f"{prefix}P@3"])


def test_settings_of_retrieval_can_be_given_and_are_checked(texts_only):
  given = dict(retrieval_augmented=True, retrieval_temperature=0.02)
  only_labels = load_predictor(texts_only.workdir, retrieval_lambda=1.0, **given)
  plain = load_predictor(texts_only.workdir)
  # With weight 0 for training queries the order is that of plain search.
  for row, other in zip(only_labels.predict(["arrow up"], 4), plain.predict(["arrow up"], 4), strict=True):
    assert [label.id for label in row] == [label.id for label in other]
  with pytest.raises(InputError, match="lambda of retrieval-augmented inference is 2"):
    load_predictor(texts_only.workdir, retrieval_lambda=2.0, **given)


def test_an_evaluation_of_held_out_queries_leaves_an_index_that_knows_all(texts_only, copy):
  from vixml_jax.experiment import evaluate_workdir

  config = configuration.read(copy / "config.json")
  config.dataset.update(dict(raw_dir=str(texts_only.raw), data_dir=str(texts_only.data)))
  config.encoder.pretrained = str(texts_only.encoder)
  config.eval.split = "validation"
  shutil.rmtree(copy / "index")
  evaluate_workdir(config, copy)
  first, second = (
    load_predictor(folder, retrieval_augmented=True).predict(["arrow up", "cloud"], 24)
    for folder in (texts_only.workdir, copy)
  )
  for row, other in zip(first, second, strict=True):
    assert [label.id for label in row] == [label.id for label in other]
    np.testing.assert_allclose([label.score for label in row], [label.score for label in other], atol=1e-6)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=1)], ids=["eight devices", "one"])
def test_a_workdir_loads_onto_any_mesh(texts_only, sizes):
  devices = jax.devices() if len(sizes) > 1 else jax.devices()[:1]
  encoder = load_trained_encoder(texts_only.workdir, sharding.make_mesh(**sizes, devices=devices))
  found = encoder.embed([query["title"] for query in texts_only.queries])
  np.testing.assert_allclose(found, texts_only.embeddings("test_queries"), atol=2e-6)


def test_few_and_many_queries_get_the_same_embeddings(texts_only, predictor):
  titles = [query["title"] for query in texts_only.queries]
  one_by_one = np.concatenate([predictor.encode([title]) for title in titles[:3]])
  whole = predictor.encode(titles * 40, whole_chunks=True)
  np.testing.assert_allclose(one_by_one, whole[:3], atol=2e-6)
  np.testing.assert_allclose(whole[-len(titles) :], whole[: len(titles)], atol=2e-6)
  assert predictor.predict([]) == []


def images_of(kind, pngs, folder, viewer):
  """Returns the same images in another form."""
  if kind == "paths":
    for i, png in enumerate(pngs):
      (folder / f"{i}.png").write_bytes(png)
    return [str(folder / f"{i}.png") for i in range(len(pngs))]
  if kind == "Pillow":
    return [Image.open(io.BytesIO(png)) for png in pngs]
  if kind == "vectors":
    return list(viewer.image_encoder(pngs)[0]) if pngs else []
  return pngs


@pytest.mark.parametrize("kind", ["bytes", "paths", "Pillow", "vectors"])
def test_images_in_every_form_give_the_embeddings_of_the_evaluation(with_images, viewer, tmp_path, kind):
  queries = []
  for i, query in enumerate(with_images.queries):
    (tmp_path / str(i)).mkdir()
    queries.append(query | {"images": images_of(kind, query.get("images", []), tmp_path / str(i), viewer)})
  assert {len(query["images"]) for query in queries} == {0, 1, 2, 3}  # The model uses at most two.
  np.testing.assert_allclose(viewer.encode(queries), with_images.embeddings("test_queries"), atol=1e-5)
  assert np.abs(viewer.encode([query["title"] for query in queries]) - viewer.encode(queries)).max() > 1e-3


def test_an_image_that_cannot_be_read_is_refused_or_left_out(with_images, viewer, tmp_path):
  png = next(query["images"][0] for query in with_images.queries if "images" in query)
  queries = [{"title": "sun", "images": [b"GIF?", png, tmp_path / "none.png"]}, "cloud"]
  with pytest.raises(InputError, match="query 0: image 0: not a PNG"):
    viewer.encode(queries)
  bad = []
  found = viewer.encode(queries, unreadable=bad)
  assert [(image.query, image.image) for image in bad] == [(0, 0), (0, 2)]
  np.testing.assert_allclose(found, viewer.encode([{"title": "sun", "images": [png]}, "cloud"]), atol=2e-6)


def test_images_need_the_tower_that_made_the_features(with_images, tmp_path):
  query = next(query for query in with_images.queries if "images" in query)
  tower = with_images.tower
  other = tmp_path / "other.npz"
  with np.load(tower) as arrays:
    np.savez(other, **{name: array + 1 for name, array in arrays.items()})
  with pytest.raises(InputError, match="other.npz: is not the tower that made the image features tiny"):
    load_predictor(with_images.workdir, image_checkpoint=str(other)).encode([query])
  copy = shutil.copytree(with_images.workdir, tmp_path / "run")
  config = json.loads((copy / "config.json").read_text())
  info = json.loads((copy / "inference.json").read_text())
  config["features"]["checkpoint"], info["image_features"]["checkpoint"] = "gone/tower.npz", "gone/too.npz"
  (copy / "config.json").write_text(json.dumps(config))
  (copy / "inference.json").write_text(json.dumps(info))
  blind = load_predictor(copy)
  with pytest.raises(
    InputError, match="made by gone/tower.npz or gone/too.npz, which does not exist here.*--image_checkpoint"
  ):
    blind.encode([query])
  assert np.isfinite(blind.encode([query["title"]])).all()


def test_filters_leave_the_best_of_what_they_allow(texts_only, predictor):
  uids = [label["uid"] for label in texts_only.labels]
  queries = [
    {"title": "arrow up", "allow": uids[3:9]},
    {"title": "arrow up", "deny": uids[:20]},
    {"title": "arrow up"},
    {"title": "arrow up", "allow": uids[3:9], "deny": uids[4:]},
  ]
  scores = (predictor.encode(["arrow up"]) @ texts_only.embeddings("labels").T)[0]
  for ids, found in zip((range(3, 9), range(20, 24), range(24), [3]), predictor.predict(queries, k=4), strict=True):
    assert [label.id for label in found] == sorted(ids, key=lambda i: -scores[i])[:4]
  with pytest.raises(InputError, match="label/none"):
    predictor.predict([{"title": "arrow up", "deny": ["label/none"]}])


def test_in_a_joint_search_training_queries_do_not_take_the_places_of_allowed_labels(texts_only):
  augmented = load_predictor(texts_only.workdir, retrieval_augmented=True)
  hits = 4
  joint = dataclasses.replace(augmented, retrieval=RetrievalSettings(0.5, 0.05, hits, joint=True))
  query = joint.encode(["arrow up"])[0]
  labels, train = (texts_only.embeddings(name) @ query for name in ("labels", "train_queries"))
  nearest = np.argsort(-np.concatenate([labels, train]), kind="stable")[:hits]
  far = np.argsort(labels)[:6].tolist()
  assert not set(far) & set(nearest.tolist())
  uids = [label["uid"] for label in texts_only.labels]
  limited, free = joint.predict([{"title": "arrow up", "allow": [uids[i] for i in far]}, "arrow up"], k=hits)
  assert len(limited) == hits and {label.id for label in limited} <= set(far)
  found = set(nearest[nearest < len(labels)].tolist())
  for row in nearest[nearest >= len(labels)] - len(labels):
    found |= set(augmented.index.query_labels.take([row]).values.tolist())
  assert {label.id for label in free} <= found and len(free) == min(hits, len(found))


def test_adapters_need_their_frozen_base_and_no_other(adapters, tmp_path):
  with pytest.raises(InputError, match="place/encoder: is no local folder|place/encoder: is neither a folder"):
    load_predictor(adapters.workdir)
  workdir = shutil.copytree(adapters.workdir, tmp_path / "run")
  base = shutil.copytree(adapters.encoder, tmp_path / "base")
  config = configuration.read(workdir / "config.json")
  config.encoder.pretrained = str(base)
  configuration.write(config, workdir / "config.json")
  predictor = load_predictor(workdir, retrieval_augmented=True)
  np.testing.assert_allclose(
    predictor.encode([query["title"] for query in adapters.queries]), adapters.embeddings("test_queries"), atol=1e-5
  )
  assert precision_at_1(adapters, predictor.predict(adapters.queries)) == pytest.approx(adapters.final["RA/P@1"])
  weights = base / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x01\x02\x03")
  with pytest.raises(InputError, match="model.safetensors has sha256 .*was trained on"):
    load_predictor(workdir)


def test_a_flipped_bit_in_the_model_is_noticed_before_it_answers(copy):
  step, meta = newest_checkpoint(copy / "checkpoints")
  assert meta["config"]["seed"] == 0
  path = max((copy / "checkpoints" / str(step) / "model").rglob("d/*"), key=lambda path: path.stat().st_size)
  flip_a_bit(path)
  with pytest.raises(InputError, match=f"{path}: is damaged .*no other checkpoint is whole"):
    load_predictor(copy)


def _without(*names):
  def damage(run):
    for name in names:
      path = run / name
      shutil.rmtree(path) if path.is_dir() else path.unlink()

  return damage


def _truncated(name):
  return lambda run: (run / name).write_text((run / name).read_text()[:-9])


def _of_another_checkpoint(run):
  path = next((run / "checkpoints").rglob("model/manifest.ocdbt"))
  path.with_name("more").write_bytes(b"x")
  write_manifest(path.parent.parent)


@pytest.mark.parametrize(
  "damage,message",
  [
    (_without("inference.json", "index", "tokenizer"), "no inference.json.*python -m vixml_jax.evaluate --workdir="),
    (_without("index"), "index.*evaluate"),
    (_without("checkpoints"), "checkpoints: contains no checkpoint; train first"),
    (_without("config.json"), "config.json: cannot be read"),
    (_without("tokenizer/tokenizer.json"), "tokenizer.json: cannot be read"),
    (_truncated("tokenizer/tokenizer.json"), "tokenizer.json: sha256 is .*damaged"),
    (_truncated("inference.json"), "inference.json: is not JSON"),
    (_of_another_checkpoint, "index.*checkpoint"),
  ],
  ids=[
    "not finished",
    "index",
    "checkpoints",
    "config",
    "tokenizer",
    "truncated tokenizer",
    "truncated info",
    "another",
  ],
)
def test_what_is_missing_or_damaged_is_named(copy, damage, message):
  damage(copy)
  with pytest.raises(InputError, match=message) as error:
    load_predictor(copy)
  assert str(copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "query,message",
  [
    (3, "query 1: must be a text or an object"),
    ({"titel": "x"}, "query 1: unknown 'titel'; known are uid, title"),
    ({"content": "x"}, "query 1: has no 'title'"),
    ({"title": 3}, "query 1: 'title' must be a text, not int"),
    ({"title": "x", "uid": 1.5}, "query 1: 'uid' must be a text or a whole number"),
    ({"title": "x", "deny": "label/1"}, "query 1: 'deny' must be a list, not str"),
    ({"title": "x", "deny": [None]}, "query 1: 'deny' must be a list of names, but contains null"),
    ({"title": "x", "images": "a.png"}, "query 1: 'images' must be a list"),
    ({"title": "x", "images": [3]}, "query 1: an image must be a path"),
    ({"title": "x", "images": [[1.0] * 7]}, "query 1: a feature vector of an image must be 8 numbers"),
    ({"title": "x", "images": [[float("nan")] * 8]}, "query 1: .* not finite"),
    ({"title": "x", "images": ["data:image/png;base64,%"]}, "query 1: an image is not base64; write data: URIs as"),
  ],
)
def test_a_bad_query_is_named_by_its_place(viewer, query, message):
  with pytest.raises(InputError, match=message):
    viewer.predict(["sun", query])


def test_queries_that_the_model_or_the_index_cannot_take_are_refused(predictor):
  with pytest.raises(InputError, match="query 0: has 'images', but this model was trained on texts only"):
    predictor.predict([{"title": "x", "images": []}])
  with pytest.raises(InputError, match="queries: must be a list"):
    predictor.predict("arrow up")
  with pytest.raises(InputError, match="k=0: must be at least 1"):
    predictor.predict(["arrow up"], k=0)


def test_more_labels_than_there_are_give_all_of_them(predictor, caplog):
  (found,) = predictor.predict(["arrow up"], k=25)
  assert found == predictor.predict(["arrow up"], k=24)[0] and len(found) == 24
  assert [record.getMessage() for record in caplog.records] == [
    "k=25: there are 24 labels, so each query gets no more than these"
  ]


def test_a_predictor_is_shown_in_one_short_line(texts_only, with_images):
  plain = load_predictor(texts_only.workdir, retrieval_augmented=True)
  assert repr(plain).startswith(f"Predictor(workdir='{texts_only.workdir}', step=")
  for predictor in (plain, load_predictor(with_images.workdir)):
    query = predictor.checked([{"title": "arrow up", "deny": ["label/1"]}])
    parts = (predictor.encoder, predictor.encoder.definition, predictor.index, predictor.filters(query), query[0])
    for shown in (predictor, *parts, predictor.encoder.tokenizer(["a", "b c"])):
      assert len(repr(shown)) < 350 and "\n" not in repr(shown) and " at 0x" not in repr(shown)


def test_queries_of_a_call_are_packed_once(predictor, monkeypatch):
  calls = []
  for module in (trained_encoder, item_encoder):
    monkeypatch.setattr(module, "pack", lambda *args, **kwargs: calls.append(args) or pack(*args, **kwargs))
  for count in (1, 5, 400):
    predictor.encode(["arrow up"] * count)
    assert len(calls) == 1
    calls.clear()


def test_the_tokenizer_is_a_copy_of_the_pretrained_one(texts_only):
  for path in (texts_only.workdir / "tokenizer").iterdir():
    assert sha256_of_file(path) == sha256_of_file(texts_only.encoder / path.name)
  assert not list((texts_only.workdir / "tokenizer").glob("*.safetensors"))
