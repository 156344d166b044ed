"""A workdir that is loaded with smaller vectors answers, ranks, serves and predicts; wrong settings are refused."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.http_server import LIMITS
from tests.helpers.miniature_runs import run_commands
from vixml_jax.errors import InputError
from vixml_jax.inference.loading import load_predictor
from vixml_jax.search.prefixes import scaled_prefix
from vixml_jax.serving.engine import Engine
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.rankings import Rankings

QUERIES = ["arrow up", {"title": "cloud", "deny": ["label/3"]}, "file"]


def ids_of(predictions):
  return [[label.id for label in row] for row in predictions]


@pytest.mark.parametrize("ranking", ["plain", "retrieval_augmented", "blend"])
@pytest.mark.parametrize("dtype", ["int8", "bit"])
def test_every_ranking_gives_its_answers_with_codes(texts_only, ranking, dtype):
  # The miniature has so few labels that all of them are candidates, also of bits.
  wanted, found = (
    load_predictor(texts_only.workdir, ranking=ranking, index_dtype=each).predict(QUERIES, 5)
    for each in ("float32", dtype)
  )
  assert ids_of(found) == ids_of(wanted)
  scores = lambda rows: [label.score for row in rows for label in row]
  np.testing.assert_allclose(scores(found), scores(wanted), atol=1e-5)


def test_scores_of_fewer_dimensions_are_the_cosines_of_prefixes(texts_only):
  predictor = load_predictor(texts_only.workdir, dims=12)
  queries, labels = (scaled_prefix(texts_only.embeddings(name), 12) for name in ("test_queries", "labels"))
  found = predictor.predict([query["title"] for query in texts_only.queries], 4)
  for row, scores in zip(found, queries @ labels.T, strict=True):
    np.testing.assert_allclose([label.score for label in row], np.sort(scores)[::-1][:4], atol=1e-5)
  assert predictor.settings()["dims"] == 12 and "dims" not in load_predictor(texts_only.workdir).settings()


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(index_dtype="int4"), "index_dtype='int4' is not known: use one of float32, int8, bit"),
    (dict(dims=33), "dims=33: must be 1 to 32, the dimension of the vectors"),
    (dict(dims=16, ranking="blend"), "dims=16: the ranking blend needs all dimensions"),
    (dict(index_dtype="bit", search="scann"), "index_dtype=bit: needs search=exact"),
  ],
)
def test_wrong_settings_are_refused(texts_only, given, message):
  with pytest.raises(InputError, match=message):
    load_predictor(texts_only.workdir, **given)


def test_the_command_predicts_with_codes_of_fewer_dimensions(texts_only, tmp_path):
  (tmp_path / "q.jsonl").write_text('{"title": "arrow up"}\n{"title": "cloud"}\n')
  flags = [
    f"--workdir={texts_only.workdir}",
    f"--queries={tmp_path}/q.jsonl",
    f"--output={tmp_path}/top.jsonl",
    "--k=5",
  ]
  commands = {
    "good": ["predict", *flags, "--k=5", "--index_dtype=int8", "--dims=12"],
    "bad": ["predict", *flags, "--dims=0"],
    "encoded": ["encode", *flags[:2], f"--output={tmp_path}/vectors", "--dims=12"],
    "wide": ["encode", *flags[:2], f"--output={tmp_path}/wide", "--dims=33"],
  }
  done = run_commands(commands, tmp_path)
  assert done["good"][0] == 0, done["good"][2]
  assert done["bad"][0] and done["bad"][2].startswith("error: ") and "dims" in done["bad"][2]
  assert done["encoded"][0] == 0, done["encoded"][2]
  assert pq.read_table(tmp_path / "vectors").schema.field("embedding").type.list_size == 12
  assert done["wide"][0] and done["wide"][2] == "error: dims=33: must be 1 to 32, the dimension of the vectors\n"
  lines = [json.loads(line)["predictions"] for line in (tmp_path / "top.jsonl").read_text().splitlines()]
  wanted = load_predictor(texts_only.workdir, dims=12).predict(["arrow up", "cloud"], 5)
  assert [[label["id"] for label in line] for line in lines] == ids_of(wanted)


def test_a_server_and_its_next_snapshot_have_the_form_that_was_asked_for(texts_only, tmp_path):
  copy = shutil.copytree(texts_only.workdir, tmp_path / "run")
  engine = Engine(lambda: Rankings.of(load_predictor(copy, index_dtype="int8", dims=12)), LIMITS, Metrics())
  engine.start()
  former = engine.model.labels
  former.delete([0])
  assert engine.reload_index()
  labels = engine.model.labels
  assert labels.form == former.form == ("int8", 12) and labels.num_live == former.num_live - 1
