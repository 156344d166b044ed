"""Writes a synthetic raw folder with the size and shape of LF-AmazonTitles-1.3M, row by row.

  .venv/bin/python benchmarks/synthetic_1_3m.py --output=/tmp/synthetic --scale=0.05

At --scale=1 there are 2,248,619 training queries, 970,237 test queries and 1,305,265 labels, with 22.2 labels per query
and a long tail of frequencies. Titles are drawn from the words of the embedded MM-Icons-9K by their frequency. Queries
that share labels share words, so that clustering and search find structure. `configs/custom.py` trains on the folder.
The same flags give the same bytes. `--title_words=1` gives titles of one word, so that a CPU can encode all rows.
"""

import argparse
import collections
import gzip
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vixml_jax.datasets import prepared, raw

ROWS = {"train": 2_248_619, "test": 970_237, "labels": 1_305_265}
_DRAWS_A_QUERY = 26.1  # Without repeats, 22.2 labels per query remain.
_TOPICS_PER_LABEL = 1 / 40
_ROWS_A_DRAW = 4096


def main() -> None:
  """Reads the flags and writes the raw folder."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=Path, required=True, help="raw folder to write")
  parser.add_argument("--scale", type=float, default=1.0, help="share of the rows of every split")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--title_words", type=int, default=0, help="words of every title; 0 for 3 to 17")
  parser.add_argument("--test_queries", type=int, default=0, help="number of test queries; 0 for the published number")
  arguments = parser.parse_args()
  write(arguments.output, arguments.scale, arguments.seed, arguments.title_words, arguments.test_queries)


def write(folder: Path, scale: float, seed: int, title_words: int = 0, test_queries: int = 0) -> None:
  """Writes all raw files of a data set with `scale` times the published number of rows.

  Args:
    folder: raw folder to write.
    scale: share of the rows of every split.
    seed: determines all rows.
    title_words: words of every title; 0 for 3 to 17.
    test_queries: number of test queries; 0 for `scale` times the published number.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rows = {split: max(1, int(count * scale)) for split, count in ROWS.items()}
  rows["test"] = test_queries or rows["test"]
  titles = Titles(np.random.default_rng([seed, 0]), rows["labels"], title_words)
  for number, split in enumerate(("labels", "train", "test"), 1):
    rng = np.random.default_rng([seed, number])
    path = folder / raw.SPLITS[split].rows
    with path.open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
      for row in tqdm(range(0, rows[split], _ROWS_A_DRAW), desc=f"write {split}", disable=None):
        count = min(_ROWS_A_DRAW, rows[split] - row)
        lines = (
          _labels(titles, rng, row, count)
          if split == "labels"
          else _queries(titles, rng, split, row, count, rows["labels"])
        )
        packed.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    if raw.SPLITS[split].filter:
      _write_filter(rng, folder / raw.SPLITS[split].filter, rows[split], rows["labels"])


class Titles:
  """Draws titles that mix words of a topic with words of all topics."""

  def __init__(self, rng: np.random.Generator, num_labels: int, title_words: int):
    self.title_words = title_words
    counts = collections.Counter()
    for split in ("trn", "tst", "lbl"):
      path = Path(prepared.__file__).parent / "mm_icons_9k" / f"{split}.json.gz"
      with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
          counts.update(json.loads(line)["title"].split())
    self.words = np.array(sorted(counts))
    frequency = np.array([counts[word] for word in self.words], np.float64)
    self.cumulative = np.cumsum(frequency) / frequency.sum()
    self.num_topics = max(1, int(num_labels * _TOPICS_PER_LABEL))
    self.topics = rng.integers(0, len(self.words), (self.num_topics, 12))

  def draw(self, rng: np.random.Generator, topics: np.ndarray) -> list[str]:
    """Returns a title for each of the given topics."""
    lengths = np.clip(rng.poisson(9, len(topics)), 3, 17)
    if self.title_words:
      lengths = np.full(len(topics), self.title_words)
    common = np.searchsorted(self.cumulative, rng.random((len(topics), 17)))
    own = self.topics[topics[:, None], rng.integers(0, 12, (len(topics), 17))]
    words = self.words[np.where(rng.random((len(topics), 17)) < 0.6, own, common)]
    return [" ".join(row[:length]) for row, length in zip(words, lengths, strict=True)]


def _labels(titles: Titles, rng: np.random.Generator, start: int, count: int) -> list[dict]:
  ids = np.arange(start, start + count)
  texts = titles.draw(rng, ids % titles.num_topics)
  return [{"uid": f"L{i}", "title": text, "content": ""} for i, text in zip(ids.tolist(), texts, strict=True)]


def _queries(
  titles: Titles, rng: np.random.Generator, split: str, start: int, count: int, num_labels: int
) -> list[dict]:
  topics = rng.integers(0, titles.num_topics, count)
  texts = titles.draw(rng, topics)
  sizes = 1 + rng.geometric(1 / (_DRAWS_A_QUERY - 1), count)
  rows = []
  for i, (topic, text, size) in enumerate(zip(topics.tolist(), texts, sizes.tolist(), strict=True)):
    targets = _targets(rng, titles.num_topics, topic, min(size, num_labels), num_labels)
    rows.append(
      {
        "uid": f"{split}/{start + i}",
        "title": text,
        "content": "",
        "target_ind": targets,
        "target_rel": [1.0] * len(targets),
      }
    )
  return rows


def _targets(rng: np.random.Generator, num_topics: int, topic: int, size: int, num_labels: int) -> list[int]:
  """Returns labels of a query: half of them from its topic, half from all labels, low numbers more often."""
  members = num_labels // num_topics + 1
  of_topic = topic + num_topics * (members * rng.random(size // 2) ** 2).astype(np.int64)
  of_all = (num_labels * rng.random(size - size // 2) ** 1.5).astype(np.int64)
  targets = np.concatenate([of_topic[of_topic < num_labels], of_all])
  return np.unique(targets).tolist()


def _write_filter(rng: np.random.Generator, path: Path, num_rows: int, num_labels: int) -> None:
  with path.open("w") as file:
    for start in range(0, num_rows, _ROWS_A_DRAW):
      rows = np.arange(start, min(start + _ROWS_A_DRAW, num_rows))
      rows = rows[rng.random(len(rows)) < 0.3]
      labels = rng.integers(0, num_labels, len(rows))
      file.writelines(f"{row} {label}\n" for row, label in zip(rows, labels, strict=True))


if __name__ == "__main__":
  main()
