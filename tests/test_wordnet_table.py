"""`benchmarks.wordnet_table`: the labels of a noun are its topics and the nouns up to two levels above it."""

import csv
import sys

import pytest

from benchmarks import wordnet_table

_NOUNS = """
1-n: {definition: [all that exists], members: [entity]}
2-n: {definition: [a living thing], members: [being, organism], hypernym: [1-n]}
3-n: {definition: ["an animal that barks, or growls"], members: [dog], hypernym: [2-n]}
4-n: {definition: [a small dog of a shepherd], members: [collie], hypernym: [3-n], domain_topic: [5-n, 9-v]}
"""


def _write(folder):
  files = folder / "src" / "yaml"
  files.mkdir(parents=True)
  (files / "noun.animal.yaml").write_text(_NOUNS)
  (files / "noun.act.yaml").write_text("5-n: {definition: [keeping sheep], members: [herding]}")
  (files / "verb.body.yaml").write_text("6-v: {definition: [to bark], members: [bark], hypernym: [7-v]}")


def test_the_table_has_definitions_and_names_of_labels(tmp_path, monkeypatch, capsys):
  _write(tmp_path)
  output = tmp_path / "wordnet.csv"
  monkeypatch.setattr(sys, "argv", ["wordnet_table", f"--source={tmp_path}", f"--output={output}"])
  wordnet_table.main()
  with output.open(newline="", encoding="utf-8") as file:
    rows = list(csv.reader(file))
  assert rows == [
    ["text", "labels"],
    ["a living thing", "entity"],
    ["an animal that barks, or growls", "being, organism|entity"],
    ["a small dog of a shepherd", "herding|dog|being, organism"],
  ]
  assert "3 texts, 4 labels" in capsys.readouterr().out


def test_a_folder_without_wordnet_is_one_line(tmp_path):
  with pytest.raises(SystemExit, match=r"no files noun.*must be a clone"):
    wordnet_table.read_nouns(tmp_path)
