"""Adds labels to a trained workdir without training, and deletes some.

  python -m vixml_jax.add_labels --workdir=runs/NAME [--labels=new.jsonl] [--delete=uids.txt]
      [--categories=categories.jsonl]

A label is a line of JSON: uid and title, and where wanted content, images (paths, data: URIs or feature vectors),
categories, and positives: queries that have it, each a text or an object with title, content and images. A label's uid
in --delete, a uid a line, takes it out for good; one that is in both files is replaced. A line of --categories, uid and
categories, says in which categories a label is, whichever it was in. All is checked and encoded before anything is
written; then `predict` finds the new labels. Needs no training data.
"""

from pathlib import Path

from absl import flags
import jax

from vixml_jax import cli
from vixml_jax.errors import InputError
from vixml_jax.inference.new_labels import (
  LabelFormat,
  NewLabel,
  add_labels,
  check_categories,
  check_new,
  embed_labels,
  ids_of_uids,
  read_categories,
  read_labels,
  read_uids,
  set_categories,
)
from vixml_jax.inference.predictor import Predictor, load, query_format
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import checkpoint_id, newest_checkpoint
from vixml_jax.run.workdir import CHECKPOINTS, INDEX
from vixml_jax.search.label_index import LabelIndex

_WORKDIR = flags.DEFINE_string("workdir", None, "A folder that vixml_jax.main wrote.")
_LABELS = flags.DEFINE_string("labels", None, "The file of new labels, .jsonl.")
_DELETE = flags.DEFINE_string("delete", None, "A text file with the uids of labels to delete, one a line.")
_CATEGORIES = flags.DEFINE_string(
  "categories", None, "A .jsonl file with uid and categories of labels, which replace those that they had."
)
_TOWER = flags.DEFINE_string(
  "image_checkpoint", None, "The SigLIP tower, for pictures; by default the one that the features were made with."
)
_IMAGE_BATCH_SIZE = flags.DEFINE_integer("image_batch_size", 64, "Pictures that go through the tower at a time.")
_MESH = flags.DEFINE_string("mesh", None, "data,fsdp,tensor, such as 4,1,2; by default as in training, or all devices.")


def main() -> None:
  """Adds and deletes the labels that the flags name."""
  if jax.process_count() > 1:
    raise InputError("--distributed: add_labels runs in one process, which uses all devices that it has")
  if _IMAGE_BATCH_SIZE.value < 1:
    raise InputError(f"--image_batch_size={_IMAGE_BATCH_SIZE.value}: must be at least 1")
  workdir = Path(cli.required(_WORKDIR))
  if _LABELS.value is None and _DELETE.value is None and _CATEGORIES.value is None:
    raise InputError("--labels: must be given, or --delete, or --categories")
  doomed = read_uids(Path(_DELETE.value)) if _DELETE.value is not None else {}
  categories = read_categories(Path(_CATEGORIES.value)) if _CATEGORIES.value is not None else {}
  labels: list[NewLabel] = []
  if _LABELS.value is not None:
    wanted = query_format(configuration.read(workdir / "config.json"))
    labels = read_labels(Path(_LABELS.value), LabelFormat(wanted.text_fields, wanted.images, wanted.feature_dim))
    predictor = _load(workdir)
  index = predictor.index if labels else _open_index(workdir)
  ids = ids_of_uids(index, doomed)
  check_new(index, labels, doomed)
  check_categories(index, categories, labels, doomed)
  done = [f"{len(ids)} deleted"] if len(ids) else []
  if labels:
    index = add_labels(index, labels, embed_labels(predictor, labels), ids)
    done.append(f"{len(labels)} added, {sum(bool(label.positives) for label in labels)} of them with positives")
  elif len(ids):
    index = index.delete(ids)
  if categories:
    index = set_categories(index, categories)
    done.append(f"categories of {len(categories)} set")
  print(f"{workdir / INDEX}: {', '.join(done)}; it has {index.num_live:,} labels")


def _open_index(workdir: Path) -> LabelIndex:
  """The index of the newest checkpoint; the model itself, which may take minutes to load, is not needed to delete."""
  step, _ = newest_checkpoint(workdir / CHECKPOINTS)
  return LabelIndex.open(workdir / INDEX, checkpoint=checkpoint_id(workdir / CHECKPOINTS, step))


def _load(workdir: Path) -> Predictor:
  return load(workdir, image_checkpoint=_TOWER.value, image_batch_size=_IMAGE_BATCH_SIZE.value, mesh=cli.mesh(_MESH))


if __name__ == "__main__":
  cli.run(main)
