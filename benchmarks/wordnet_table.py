"""Writes the nouns of Open English WordNet as a table: a text is a definition, its labels are the more general nouns.

  git clone https://github.com/globalwordnet/english-wordnet
  python -m benchmarks.wordnet_table --source=english-wordnet --output=wordnet.csv

The labels of a noun are its hypernyms and theirs in turn, two levels up, and its topics. A label is named by its words,
such as "dog, domestic dog". No word of the noun itself is in the table. WordNet is by Princeton University and the Open
English WordNet team (CC BY 4.0).
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import yaml

SEPARATOR = "|"
_LEVELS = 2


def main() -> None:
  """Writes the table and prints its size."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--source", type=Path, required=True, help="folder of the repository")
  parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
  arguments = parser.parse_args()
  rows = table(read_nouns(arguments.source / "src" / "yaml"))
  with arguments.output.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["text", "labels"])
    writer.writerows((text, SEPARATOR.join(labels)) for text, labels in rows)
  print(f"{arguments.output}: {len(rows):,} texts, {len({label for _, labels in rows for label in labels}):,} labels")


def read_nouns(folder: Path) -> dict[str, dict[str, Any]]:
  """Returns the synsets of all files `noun.*.yaml`, by id."""
  nouns: dict[str, dict[str, Any]] = {}
  for path in sorted(folder.glob("noun.*.yaml")):
    nouns |= yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
  if not nouns:
    raise SystemExit(f"{folder}: has no files noun.*.yaml; --source must be a clone of globalwordnet/english-wordnet")
  return nouns


def table(nouns: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
  """Returns definition and names of labels of each noun that has any, in the order of ids."""
  rows = []
  for own, noun in sorted(nouns.items()):
    found, level = list(noun.get("domain_topic", ())), [own]
    for _ in range(_LEVELS):
      level = [more_general for synset in level for more_general in nouns[synset].get("hypernym", ())]
      found += level
    names = dict.fromkeys(_name(nouns[synset]) for synset in found if synset in nouns)
    if names:
      rows.append((noun["definition"][0], list(names)))
  return rows


def _name(noun: dict[str, Any]) -> str:
  return ", ".join(noun["members"])


if __name__ == "__main__":
  main()
