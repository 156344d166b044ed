"""Labels that are added after training: their prototypes, search with and without them, and bad input."""

import base64
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.helpers.miniature_runs import run_commands
from tests.helpers.trained_workdirs import raw_records
from vixml_jax.errors import InputError
from vixml_jax.inference.label_files import label_format, read_categories, read_labels, read_uids
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.new_labels import (
  add_labels,
  check_categories,
  check_new,
  embed_labels,
  ids_of_uids,
  nearest_clusters,
)
from vixml_jax.row_files import RowFiles
from vixml_jax.search import snapshots
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.label_index_files import IndexContents, write_index
from vixml_jax.search.scann_index import scann_available

NEW = [
  {"uid": "new/0", "title": "horse code chip", "positives": ["horse chip", {"title": "code", "uid": 3}]},
  {"uid": "new/1", "title": "gift cake cup", "content": "a party"},
  {"uid": 2, "title": "bell alarm", "positives": []},
]
needs_scann = pytest.mark.skipif(not scann_available()[0], reason=scann_available()[1])
kinds = pytest.mark.parametrize("search", ["exact", pytest.param("scann", marks=needs_scann)])


@pytest.fixture(scope="module")
def predictor(texts_only):
  return load_predictor(texts_only.workdir)


@pytest.fixture(scope="module")
def viewer(with_images):
  return load_predictor(with_images.workdir)


def parsed(predictor, records):
  return [label_format(predictor.encoder.config).parse(record, f"label {i}") for i, record in enumerate(records)]


def with_index(predictor, folder, search="exact"):
  """Returns the predictor with a copy of its index that the test may edit."""
  index, ids = predictor.index, np.arange(predictor.index.num_labels)
  contents = IndexContents(
    index.embeddings,
    index.texts(ids),
    index.uids(ids),
    index.label_clusters,
    index.cluster_means,
    queries=RowFiles(predictor.encoder.workdir / "embeddings", "train_queries"),
    query_labels=index.query_labels,
    query_texts=index.query_texts,
  )
  checkpoint = predictor.encoder.checkpoint
  write_index(folder, contents, checkpoint=checkpoint, search=search, retrieval=index.retrieval, mesh=predictor.mesh)
  return dataclasses.replace(predictor, index=LabelIndex.open(folder, checkpoint=checkpoint, mesh=predictor.mesh))


def with_labels(predictor, records):
  labels = parsed(predictor, records)
  index = add_labels(predictor.index, labels, embed_labels(predictor, labels), [])
  return dataclasses.replace(predictor, index=index)


def embedded(predictor, labels):
  """Returns prototypes and clusters of labels."""
  found = embed_labels(predictor, labels)
  return found.prototypes, found.clusters


# Prototypes.


def test_a_label_of_the_training_data_with_its_queries_gets_the_prototype_that_training_gave_it(with_images, viewer):
  queries = raw_records(with_images.raw, "train")
  labels = [
    {
      **label,
      "positives": [
        {key: query[key] for key in ("title", "content", "images") if key in query}
        for query in queries
        if number in query["target_ind"]
      ],
    }
    for number, label in enumerate(raw_records(with_images.raw, "labels"))
  ]
  assert {len(label.get("images", ())) for label in labels} == {0, 1} and all(label["positives"] for label in labels)
  prototypes, clusters = embedded(viewer, parsed(viewer, labels))
  # Training made balanced clusters with its initial model, so a label may be nearer to another one.
  same = clusters == viewer.index.label_clusters
  assert same.mean() > 0.5
  np.testing.assert_allclose(prototypes[same], with_images.embeddings("labels")[same], atol=2e-5)


def test_a_new_label_has_the_nearest_cluster_and_the_mean_of_its_positives_or_itself(predictor):
  prototypes, clusters = embedded(predictor, parsed(predictor, NEW))
  own = predictor.encode([label["title"] for label in NEW])
  norms = np.linalg.norm(predictor.index.cluster_means, axis=1)
  cosines = own @ predictor.index.cluster_means.T / np.where(norms > 0, norms, np.inf)
  np.testing.assert_array_equal(clusters, cosines.argmax(1))
  centroids = np.stack([predictor.encode(["horse chip", "code"]).mean(0), own[1], own[2]])
  pooled = predictor.encoder.pooled([label["title"] for label in NEW], whole_chunks=True)
  wanted = predictor.encoder.prototypes(pooled, clusters, centroids)
  np.testing.assert_allclose(prototypes, wanted, atol=2e-6)
  np.testing.assert_allclose(np.linalg.norm(prototypes, axis=1), 1, rtol=1e-5)
  # Positives change the prototype.
  other, _ = embedded(predictor, parsed(predictor, [NEW[0] | {"positives": ["snow rain"]}]))
  assert np.abs(other[0] - prototypes[0]).max() > 1e-3


def test_the_nearest_cluster_is_one_with_labels_and_by_direction():
  clusters = np.float32([[0, 0], [0.1, 0], [0.6, 0.6], [0, 0], [-0.1, 0]])
  embeddings = np.float32([[1, 0.1], [0.6, 0.5], [-0.9, -0.5], [0, -1]])
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
  assert nearest_clusters(embeddings, clusters, mesh).tolist() == [
    1,
    2,
    4,
    1,
  ]  # Two clusters are equally near to the last embedding.
  assert clusters[2, 0] == np.float32(0.6), "the index's own array stays as it is"


def test_one_by_one_they_get_what_they_get_together(predictor, tmp_path):
  together, clusters = embedded(predictor, parsed(predictor, NEW))
  growing = with_index(predictor, tmp_path / "index")
  for record in reversed(NEW):
    growing = with_labels(growing, [record])
  ids = growing.index.ids_of([str(record["uid"]) for record in NEW])
  assert ids.tolist() == [26, 25, 24]
  np.testing.assert_allclose(growing.index.embeddings[ids], together, atol=2e-6)
  np.testing.assert_array_equal(growing.index.label_clusters[ids], clusters)


# The index.


@kinds
def test_added_labels_are_found_and_deleted_ones_are_not(predictor, tmp_path, search):
  larger = with_labels(with_index(predictor, tmp_path / "index", search), NEW)
  assert larger.index.search_kind == search and larger.index.num_live == 27
  queries = [{"title": label["title"], "allow": None} for label in NEW]
  wanted, _ = embedded(predictor, parsed(predictor, NEW))
  everything = np.concatenate([predictor.index.embeddings, wanted])
  scores = predictor.encode(queries) @ everything.T
  for row, found in zip(scores, larger.predict(queries, 27), strict=True):
    assert [label.id for label in found] == np.argsort(-row, kind="stable").tolist()
    assert [(label.label, label.text) for label in found if label.id >= 24] == [
      (str(NEW[label.id - 24]["uid"]), NEW[label.id - 24]["title"]) for label in found if label.id >= 24
    ]
  doomed = {"new/1": "", "label/7": ""}
  smaller = dataclasses.replace(larger, index=larger.index.delete(ids_of_uids(larger.index, doomed)))
  for row, found in zip(scores, smaller.predict(queries, 25), strict=True):
    assert [label.id for label in found] == [i for i in np.argsort(-row, kind="stable") if i not in (7, 25)]


def test_a_label_ranks_high_for_its_own_text(predictor, tmp_path):
  titles = ["chip disk data code horse dog", "rain snow sun cloud", "mail chat call phone"]
  larger = with_labels(with_index(predictor, tmp_path / "index"), [{"uid": title, "title": title} for title in titles])
  ranks = [
    [label.label for label in found].index(title)
    for title, found in zip(titles, larger.predict(titles, 27), strict=True)
  ]
  assert np.mean(ranks) < 6, ranks  # Chance is 13.


def test_retrieval_augmentation_gives_new_labels_their_own_share_and_that_of_their_positives(
  predictor, texts_only, tmp_path
):
  larger = with_labels(with_index(predictor, tmp_path / "index"), NEW)
  augmented = dataclasses.replace(
    larger, retrieval=load_predictor(texts_only.workdir, retrieval_augmented=True, retrieval_lambda=0.5).retrieval
  )
  found = {label.id: label.score for label in augmented.predict([NEW[0]["title"]], 27)[0]}
  query = predictor.encode([NEW[0]["title"]])[0].astype(np.float64)
  labels = np.exp(larger.index.embeddings @ query / augmented.retrieval.temperature)
  positives = predictor.encode(["horse chip", "code"])
  index = augmented.index
  assert index.query_texts.take([len(index.query_labels) - 2, len(index.query_labels) - 1]) == ["horse chip", "code"]
  memory = np.exp(
    np.concatenate([texts_only.embeddings("train_queries"), positives]) @ query / augmented.retrieval.temperature
  )
  total = labels.sum() + memory.sum()
  # No training query has labels 25 and 26.
  for number, share in ((24, labels[24] + memory[-2:].sum()), (25, labels[25]), (26, labels[26])):
    assert found[number] == pytest.approx(0.5 * share / total, rel=1e-3)
  assert sum(found.values()) > 0.5 * labels.sum() / total


def test_killing_the_process_that_adds_labels_keeps_the_former_index(predictor, tmp_path, monkeypatch):
  own = with_index(predictor, tmp_path / "index")
  before = own.predict(["gift cake cup"], 24)

  def kill(path):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(snapshots, "new_file", kill)
    with_labels(own, NEW)
  again = dataclasses.replace(
    own, index=LabelIndex.open(tmp_path / "index", checkpoint=own.encoder.checkpoint, mesh=own.mesh)
  )
  assert again.predict(["gift cake cup"], 24) == before and again.index.num_labels == 24
  assert with_labels(again, NEW).index.num_labels == 27


def test_categories_of_new_labels_filter(predictor, tmp_path):
  larger = with_labels(with_index(predictor, tmp_path / "index"), [NEW[0] | {"categories": ["beast"]}, NEW[1]])
  (found,) = larger.predict([{"title": "sun", "categories": ["beast"]}], 5)
  assert [label.label for label in found] == ["new/0"]


# Bad input.


@pytest.mark.parametrize(
  "line,message",
  [
    ('{"uid": "x"}', "has no 'title'"),
    ('{"title": "x"}', "has no 'uid'"),
    ('{"uid": null, "title": "x"}', "has no 'uid'"),
    ('{"uid": "", "title": "x"}', "'uid' is empty"),
    ('{"uid": "\\ud800", "title": "x"}', "half a surrogate pair"),
    ('{"uid": [1], "title": "x"}', "'uid' must be a text or a whole number, not list"),
    ('{"uid": "x", "title": "  "}', "'title' is empty"),
    ('{"uid": "x", "title": 3}', "'title' must be a text, not int"),
    ('{"uid": "x", "title": "y", "target_ind": []}', "unknown 'target_ind'; known are uid, title"),
    ('{"uid": "x", "title": "y", "images": []}', "trained on texts only"),
    ('{"uid": "x", "title": "y", "positives": "z"}', "'positives' must be a list of queries, not str"),
    ('{"uid": "x", "title": "y", "positives": ["z", 3]}', "positive 1: must be a text or an object"),
    ('{"uid": "x", "title": "y", "positives": [" "]}', "positive 0: has no text"),
    ('{"uid": "x", "title": "y", "positives": [{"title": "z", "deny": []}]}', "positive 0: unknown 'deny'"),
    ('["x"]', "must be an object with 'uid' and 'title', not list"),
    ('{"uid": "x", "ti', "not valid JSON"),
  ],
)
def test_a_bad_label_is_named_by_file_and_line(predictor, tmp_path, line, message):
  path = tmp_path / "new.jsonl"
  path.write_text(f"{json.dumps(NEW[0])}\n\n{line}\n")
  with pytest.raises(InputError, match=f"new.jsonl:3: .*{message}"):
    read_labels(path, label_format(predictor.encoder.config))


def test_uids_of_two_labels_are_named_by_line(predictor, tmp_path):
  path = tmp_path / "new.jsonl"
  path.write_text("".join(json.dumps({"uid": uid, "title": "x"}) + "\n" for uid in ("a", "label/3", "a")))
  labels = read_labels(path, label_format(predictor.encoder.config))
  with pytest.raises(InputError, match="new.jsonl:2: uid 'label/3' belongs to a label of .*index"):
    check_new(predictor.index, labels, {})
  with pytest.raises(InputError, match=r"new.jsonl:3: uid 'a' is also that of .*new.jsonl:1; every"):
    check_new(predictor.index, labels, {"label/3": "uids.txt:1"})
  check_new(predictor.index, labels[:2], {"label/3": "uids.txt:1"})


def test_uids_to_delete_are_read_exactly_and_unknown_ones_named_by_line(predictor, tmp_path):
  path = tmp_path / "uids.txt"
  path.write_bytes(b"\xef\xbb\xbflabel/3\r\n\r\nlabel/1\nlabel/3")
  assert ids_of_uids(predictor.index, read_uids(path)).tolist() == [3, 1]
  path.write_text("label/3\nlabel /1\n")
  with pytest.raises(InputError, match="uids.txt:2: label 'label /1' is not in"):
    ids_of_uids(predictor.index, read_uids(path))
  for content, message in ((b"\n \n", "has no uids"), (b"\xff\xfe", "uids.txt: cannot be read")):
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
      read_uids(path)


@pytest.mark.parametrize(
  "name,message",
  [
    ("new.csv", "new.csv: files of labels end in .jsonl"),
    ("none.jsonl", "none.jsonl: no such file; --labels"),
    ("empty.jsonl", "empty.jsonl: has no labels"),
  ],
)
def test_files_that_are_not_files_of_labels_are_refused(predictor, tmp_path, name, message):
  (tmp_path / "empty.jsonl").write_text("\n")
  with pytest.raises(InputError, match=message):
    read_labels(tmp_path / name, label_format(predictor.encoder.config))


def test_images_come_beside_the_file_or_in_it_and_a_bad_one_is_named(with_images, viewer, tmp_path):
  png = next(query["images"][0] for query in with_images.queries if "images" in query)
  (tmp_path / "a.png").write_bytes(png)
  inside = "data:image/png;base64," + base64.b64encode(png).decode()
  lines = [
    {"uid": "a", "title": "sun", "images": ["a.png"]},
    {"uid": "b", "title": "sun", "images": [inside]},
    {"uid": "c", "title": "sun"},
  ]
  path = tmp_path / "new.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  beside, within, without = embedded(viewer, read_labels(path, label_format(viewer.encoder.config)))[0]
  np.testing.assert_allclose(beside, within, atol=1e-6)
  assert np.abs(beside - without).max() > 1e-3
  for bad, place in (
    ({"images": [inside, "b.png"]}, "image 1"),
    ({"positives": ["x", {"title": "y", "images": ["new.jsonl"]}]}, "positive 1: image 0"),
  ):
    path.write_text("\n".join(map(json.dumps, [lines[0], {"uid": "d", "title": "sun"} | bad])))
    with pytest.raises(InputError, match=f"new.jsonl:2: {place}"):
      embedded(viewer, read_labels(path, label_format(viewer.encoder.config)))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "not valid JSON"),
    ("[1]", "must be an object"),
    ('{"uid": "a"}', "must be an object"),
    ('{"uid": 3, "categories": []}', "must be an object"),
    ('{"uid": "a", "categories": "red"}', "a list of names"),
    ('{"uid": "a", "categories": [" "]}', "a list of names"),
    ('{"uid": "b", "categories": []}', "is also in .*:1; give"),
    ('{"uid": " ", "categories": []}', "'uid' is empty"),
  ],
)
def test_bad_lines_of_categories_are_named(tmp_path, line, message):
  path = tmp_path / "categories.jsonl"
  path.write_text('{"uid": "b", "categories": ["red"]}\n\n' + line)
  with pytest.raises(InputError, match=f"categories.jsonl:3: .*{message}"):
    read_categories(path)


def test_categories_of_labels_that_will_not_exist_are_refused(predictor, tmp_path):
  path = tmp_path / "categories.jsonl"
  path.write_text('{"uid": "label/2", "categories": ["red"]}\n{"uid": "new/0", "categories": ["red"]}')
  categories = read_categories(path)
  labels = parsed(predictor, NEW)
  check_categories(predictor.index, categories, labels, {})
  with pytest.raises(InputError, match="categories.jsonl:2: label 'new/0' is not in"):
    check_categories(predictor.index, categories, [], {})
  with pytest.raises(InputError, match="categories.jsonl:1: label 'label/2' is to be deleted by gone.txt:5"):
    check_categories(predictor.index, categories, labels, {"label/2": "gone.txt:5"})


# The command.


def test_the_command_adds_replaces_and_deletes_and_writes_nothing_after_an_error(texts_only, predictor, tmp_path):
  workdir = shutil.copytree(texts_only.workdir, tmp_path / "run")
  replaced = {"uid": "label/3", "title": "ship bus", "positives": ["ship"]}
  files = {"new.jsonl": [*NEW, replaced], "late.jsonl": [NEW[0], {"uid": "label/4", "title": "x"}]}
  for name, records in files.items():
    (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
  (tmp_path / "uids.txt").write_text("label/3\nlabel/5\n")
  (tmp_path / "one.txt").write_text("new/0")
  categories = [{"uid": "label/0", "categories": ["red", "blue"]}, {"uid": "new/1", "categories": []}]
  (tmp_path / "categories.jsonl").write_text("\n".join(map(json.dumps, categories)))
  (tmp_path / "lost.jsonl").write_text(json.dumps({"uid": "label/5", "categories": ["red"]}))
  flags = {
    "taken": ["--labels=late.jsonl", "--delete=uids.txt"],
    "nothing": [],
    "good": ["--labels=new.jsonl", "--delete=uids.txt"],
    "delete": ["--delete=one.txt"],
    "gone": ["--delete=one.txt"],
    "lost": ["--labels=late.jsonl", "--categories=lost.jsonl"],
    "categories": ["--categories=categories.jsonl"],
  }
  places = {name: [flag.replace("=", f"={tmp_path}/") for flag in given] for name, given in flags.items()}
  commands = {name: ["add_labels", f"--workdir={workdir}", *given] for name, given in places.items()}
  done = run_commands(commands, tmp_path)
  for name, message in (
    ("taken", "late.jsonl:2: uid 'label/4'"),
    ("nothing", "--labels: must be given"),
    ("gone", "one.txt:1: label 'new/0' was deleted"),
    ("lost", "late.jsonl:2: uid 'label/4'"),
  ):
    status, stdout, stderr = done[name]
    assert status == 1 and not stdout and [message in line for line in stderr.splitlines()].count(True) == 1, stderr
  assert done["good"][:2] == (0, f"{workdir}/index: 2 deleted, 4 added, 2 of them with positives; it has 26 labels\n")
  assert done["delete"][:2] == (0, f"{workdir}/index: 1 deleted; it has 25 labels\n")
  assert done["categories"][:2] == (0, f"{workdir}/index: categories of 2 set; it has 25 labels\n")
  index = load_predictor(workdir).index
  assert index.categories == ["blue", "red"]
  live = sorted(index.uids(np.flatnonzero(~index.deleted)))
  assert live == sorted([*(f"label/{i}" for i in range(24) if i != 5), "new/1", "2"])
  assert index.info["edits"] == 3, "one of each good command; none of those that failed"
  wanted, _ = embedded(predictor, parsed(predictor, [replaced]))
  np.testing.assert_allclose(index.embeddings[index.ids_of(["label/3"])], wanted, atol=2e-6)
