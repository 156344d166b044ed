"""Computes the baselines that a config asks for, and keeps their metrics beside the prepared data for other runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.evaluation.baselines import BaselineTask, plt, tfidf, untrained
from vixml_jax.evaluation.blend_fitting import CorpusWords
from vixml_jax.files import fingerprint_of, read_json_object, write_json
from vixml_jax.remote import local_data_dir
from vixml_jax.typing import Tree

_FOLDER = "baselines"


def baseline_rows(
  names: Sequence[str],
  config: ConfigDict,
  task: BaselineTask,
  encoder: ItemEncoder,
  weights_sha256: dict[str, str],
  params: Callable[[], Tree],
  words: CorpusWords | None,
) -> dict[str, dict[str, float]]:
  """Returns the metrics of baselines in percent, by the name of the row.

  Metrics are stored in `baselines/` of the local `dataset.data_dir`, and computed if they are not there. All processes
  must call this together. A baseline that failed has no row and is not stored, so that the next evaluation tries it
  again.

  Args:
    names: some of "tfidf", "untrained", "plt".
    config: the whole config.
    task: the data set and the evaluation.
    encoder: encodes items.
    weights_sha256: hashes of the pretrained weights.
    params: returns the trainable parameters before the first step.
    words: words of the data set; None to read them if a baseline needs them.
  """
  rows: dict[str, dict[str, float]] = {}
  for name in names:
    settings = _settings(config, task, name, weights_sha256)
    path = local_data_dir(config.dataset.data_dir) / _FOLDER / f"{name}-{fingerprint_of(settings)[:16]}.json"
    is_stored = path.exists()
    sharding.wait_for_all_processes(f"the stored baseline {name} was looked for")
    if is_stored:
      again = "delete it to have it computed again"
      rows |= read_json_object(path, absent=again, damaged=again)["rows"]
      continue
    if name == "untrained":
      found = untrained(task, encoder, params(), config.eval.search)
    else:
      words = words or CorpusWords.read(task.data.corpus, task.data.known)
      found = (tfidf if name == "tfidf" else plt)(task, words)
    rows |= found
    if found and jax.process_index() == 0:
      path.parent.mkdir(exist_ok=True)
      write_json(path, {"settings": settings, "rows": found})
  return rows


def _settings(config: ConfigDict, task: BaselineTask, name: str, weights_sha256: dict[str, str]) -> dict[str, Any]:
  """Returns all that the metrics of a baseline depend on, as JSON."""
  settings = {
    "data": task.data.fingerprint,
    "seed": config.seed,
    "dataset": {key: config.dataset[key] for key in ("validation_fraction", "propensity_a", "propensity_b")},
    "ks": [*task.config.ks],
    "recall_ks": [*task.config.recall_ks],
    "retrieval": task.retrieval.as_json() | {"lambda": None, "temperature": None},  # Chosen for each baseline.
  }
  if name == "untrained":
    encoder = {key: value for key, value in config.encoder.items() if key not in ("pretrained", "attention")}
    settings |= {
      "weights": weights_sha256,
      "encoder": encoder,
      "prompt": config.prompt.to_dict(),
      "search": config.eval.search,
    }
  return settings
