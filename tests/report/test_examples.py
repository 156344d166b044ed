"""Example queries of the report: texts, labels, ranks and images."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image
import pytest

from tests.helpers.miniature import read_lines, write_raw_folder
from vixml_jax import datasets
from vixml_jax.input.corpus import Corpus
from vixml_jax.ragged import Ragged
from vixml_jax.report.examples import ShownPrediction, collect_examples


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Raw folder and corpus of a miniature with images; its tokens are not needed."""
  folder = tmp_path_factory.mktemp("examples")
  raw = write_raw_folder(folder / "raw", images=True)
  builder = datasets.prepare("custom", raw, folder / "data")
  names = {field.name: None for field in dataclasses.fields(Corpus)}
  return raw, Corpus(**names | dict(builder=builder, text_fields=("title",)))


def test_examples_are_the_queries_with_their_labels_ranks_and_images(corpus):
  raw, corpus = corpus
  queries, labels = read_lines(raw / "tst.json.gz"), [label["title"] for label in read_lines(raw / "lbl.json.gz")]
  truth = Ragged.from_rows([query["target_ind"] for query in queries])
  rng = np.random.default_rng(0)
  ids = {name: np.stack([rng.permutation(24)[:10] for _ in range(16)]).astype(np.int32) for name in ("plain", "other")}
  ids["plain"][:, 3:] = -1
  scores = {name: np.linspace(1, 0, 160, dtype=np.float32).reshape(16, 10) for name in ids}
  examples = collect_examples(corpus, "test", np.arange(16), truth, ids, scores)
  assert len(examples) == 16
  for query, example in enumerate(examples):
    assert example.text == queries[query]["title"]
    for name, found in ids.items():
      assert example.predictions[name] == [
        ShownPrediction(labels[label], pytest.approx(score), label in queries[query]["target_ind"])
        for label, score in list(zip(found[query], scores[name][query], strict=True))[:5]
        if label >= 0
      ]
    assert sorted(label.text for label in example.truth) == sorted(
      labels[label] for label in queries[query]["target_ind"]
    )
    for label in example.truth:
      for name, found in ids.items():
        ranked = [labels[other] if other >= 0 else None for other in found[query]]
        assert label.ranks[name] == (ranked.index(label.text) + 1 if label.text in ranked else None)
  images = [image for example in examples for image in example.images]
  assert max(len(example.images) for example in examples) == 3 and len(images) < 3 * len(examples)
  for image in images:
    head, _, data = image.partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 8)
