"""The tokenized corpus: tokens as transformers gives them, cached under what decides them, in bounded memory."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.helpers import miniature
from tests.helpers.damage import DAMAGES, files_of, flip_a_bit
from vixml_jax import datasets
from vixml_jax.datasets import records
from vixml_jax.errors import InputError
from vixml_jax.input import corpus as corpus_module
from vixml_jax.input.corpus import load_corpus
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.manifest import MANIFEST

SPLITS = {"train": "train_tokens", "test": "test_tokens", "labels": "label_tokens"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = tmp_path_factory.mktemp("corpus")
  miniature.write_raw_folder(place / "raw", images=True)
  miniature.write_tokenizer(place / "tokenizer")
  return place


@pytest.fixture(scope="module")
def builder(place):
  return datasets.prepare("custom", place / "raw", place / "data")


def _lines(place, split):
  return miniature.read_lines(place / "raw" / f"{miniature.SPLIT_NAMES[split]}.json.gz")


def _filter_lines(place, split):
  return (place / "raw" / f"filter_labels_{split}.txt").read_text().splitlines()


def _load(builder, place, cache, max_length=6, fields=("title",)):
  return load_corpus(builder, Tokenizer(place / "tokenizer", max_length), fields, cache)


@pytest.mark.parametrize("fields", [("title",), ("title", "content"), ("content",)])
def test_tokens_are_those_of_transformers_cut_on_the_right(builder, place, tmp_path, fields, monkeypatch):
  monkeypatch.setattr(records, "ROWS_PER_READ", 10)
  corpus = _load(builder, place, tmp_path, fields=fields)
  reference = AutoTokenizer.from_pretrained(place / "tokenizer", local_files_only=True)
  lengths = []
  for split, name in SPLITS.items():
    texts = [" ".join(line[field] for field in fields) for line in _lines(place, split)]
    expected = reference(texts, truncation=True, max_length=6)["input_ids"]
    tokens = getattr(corpus, name)
    assert [tokens[i].tolist() for i in range(len(tokens))] == expected
    assert tokens.values.dtype == np.int32
    lengths += map(len, expected)
  assert max(lengths) == 6
  assert "content" in fields or min(lengths) < 6
  assert reference.unk_token_id not in corpus.train_tokens.values


def test_labels_and_filters_are_those_of_the_raw_files(builder, place, tmp_path):
  corpus = _load(builder, place, tmp_path)
  for split in ("train", "test"):
    targets, excluded = getattr(corpus, f"{split}_labels"), getattr(corpus, f"{split}_filter")
    pairs = [line.split() for line in _filter_lines(place, split)]
    for row, line in enumerate(_lines(place, split)):
      assert targets[row].tolist() == line["target_ind"]
      assert excluded[row].tolist() == [int(b) for a, b in pairs if int(a) == row]
  assert corpus.num_labels == 24
  assert corpus.vocab_size == len(AutoTokenizer.from_pretrained(place / "tokenizer"))


def test_text_is_read_back_by_row(builder, place, tmp_path):
  corpus = _load(builder, place, tmp_path, fields=("title", "content"))
  train, labels = _lines(place, "train"), _lines(place, "labels")
  joined = [f"{train[i]['title']} {train[i]['content']}" for i in (5, 0, 63)]
  assert corpus.query_text("train", np.int32([5, 0, 63])) == joined
  assert corpus.label_text([3]) == [f"{labels[3]['title']} {labels[3]['content']}"]
  assert corpus.label_text([]) == []


def test_second_load_reads_the_cache_and_no_record(builder, place, tmp_path, monkeypatch):
  first = _load(builder, place, tmp_path)
  monkeypatch.setattr(corpus_module, "Records", None)
  second = _load(builder, place, tmp_path)
  assert second.fingerprint == first.fingerprint
  np.testing.assert_array_equal(second.train_tokens.values, first.train_tokens.values)
  np.testing.assert_array_equal(second.test_filter.offsets, first.test_filter.offsets)
  assert isinstance(second.train_tokens.values, np.memmap)


def test_fingerprint_depends_on_everything_that_decides_the_tokens(builder, place, tmp_path):
  raw = miniature.write_raw_folder(tmp_path / "raw", seed=1)
  other_data = datasets.prepare("custom", raw, tmp_path / "data")
  tokenizer = miniature.write_tokenizer(tmp_path / "tokenizer")
  content = json.loads((tokenizer / "tokenizer.json").read_text())
  vocabulary = content["model"]["vocab"]
  vocabulary["arrow"], vocabulary["left"] = vocabulary["left"], vocabulary["arrow"]
  (tokenizer / "tokenizer.json").write_text(json.dumps(content))
  corpora = [
    _load(builder, place, tmp_path / "cache"),
    _load(builder, place, tmp_path / "cache", max_length=7),
    _load(builder, place, tmp_path / "cache", fields=("content",)),
    load_corpus(other_data, Tokenizer(place / "tokenizer", 6), ("title",), tmp_path / "cache"),
    load_corpus(builder, Tokenizer(tokenizer, 6), ("title",), tmp_path / "cache"),
  ]
  assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)


def test_fields_default_to_those_of_the_published_set(place, tmp_path, monkeypatch):
  miniature.expect_miniature(monkeypatch, "lf_amazon_131k", place / "raw")
  builder = datasets.prepare("lf_amazon_131k", place / "raw", tmp_path / "data")
  corpus = _load(builder, place, tmp_path / "cache", fields=None)
  assert corpus.text_fields == ("title", "content")


def test_interrupted_build_leaves_no_cache_and_the_next_succeeds(builder, place, tmp_path, monkeypatch):
  def stop(*arguments):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(records.Record, "numbers", stop)
    with pytest.raises(KeyboardInterrupt):
      _load(builder, place, tmp_path)
  assert not [path for path in tmp_path.iterdir() if path.is_dir()]
  # What SIGKILL leaves is a folder under another name.
  fingerprint = _load(builder, place, tmp_path / "other").fingerprint
  (tmp_path / f"custom-{fingerprint[:16]}-v2.incomplete").mkdir()
  assert len(_load(builder, place, tmp_path).train_tokens) == 64
  assert len([path for path in tmp_path.glob("custom-*") if path.is_dir()]) == 1


def test_row_without_text_has_only_the_special_tokens(place, tmp_path):
  raw = miniature.write_raw_folder(tmp_path / "raw")
  lines = miniature.read_lines(raw / "tst.json.gz")
  lines[2] |= {"title": "", "target_ind": [], "target_rel": []}
  miniature.write_lines(raw / "tst.json.gz", lines)
  corpus = _load(datasets.prepare("custom", raw, tmp_path / "data"), place, tmp_path / "cache")
  assert len(corpus.test_tokens[2]) == 2
  assert len(corpus.test_labels[2]) == 0


def test_unknown_text_field_is_named(builder, place, tmp_path):
  with pytest.raises(InputError, match="unknown text field 'body'; choose from title, content"):
    _load(builder, place, tmp_path, fields=("body",))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_written_again(builder, place, tmp_path, caplog, kind):
  fingerprint = _load(builder, place, tmp_path).fingerprint
  folder = tmp_path / f"custom-{fingerprint[:16]}-v2"
  whole = {name: (folder / name).read_bytes() for name in files_of(folder)}
  for name in whole:
    caplog.clear()
    DAMAGES[kind](folder / name)
    _load(builder, place, tmp_path)
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == whole
    (line,) = caplog.messages
    assert str(folder / name) in line and line.endswith("the folder is written again")


def test_a_cache_of_a_version_without_hashes_is_written_again(builder, place, tmp_path, caplog):
  fingerprint = _load(builder, place, tmp_path).fingerprint
  manifest = tmp_path / f"custom-{fingerprint[:16]}-v2" / MANIFEST
  manifest.unlink()
  _load(builder, place, tmp_path)
  assert manifest.exists() and "the folder is written again" in caplog.text


def test_damaged_data_are_noticed_before_tokens_are_made_from_them(place, tmp_path):
  builder = datasets.prepare("custom", place / "raw", tmp_path / "data")
  (path,) = Path(builder.data_path).glob("*test.array_record*")
  flip_a_bit(path)
  with pytest.raises(InputError, match=f"{path}: is damaged .*; delete {builder.data_path} and start the same"):
    _load(builder, place, tmp_path / "cache")
