"""Adds labels to a trained workdir without training, deletes labels, and sets their categories.

  python -m vixml_jax.add_labels --workdir=runs/NAME [--labels=new.jsonl] [--delete=uids.txt]
      [--categories=categories.jsonl]

A new label is a line of JSON: uid and title, and optionally content, images (paths, data: URIs or feature vectors),
categories, and positives: queries that have the label, each a text or an object with title, content and images.
--delete names a file with a uid per line; these labels are removed permanently. A label whose uid is in both files is
replaced. A line of --categories has uid and categories, which replace the label's former categories. Everything is
checked and encoded before anything is written; then `predict` finds the new labels. No training data are needed.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from vixml_jax import cli, inference_flags
from vixml_jax.errors import InputError
from vixml_jax.run.workdir import CHECKPOINTS, CONFIG, INDEX

if TYPE_CHECKING:
  from vixml_jax.search.label_index import LabelIndex

_MODEL = inference_flags.define_model_flags(image_batch_size=64)
_LABELS = flags.DEFINE_string("labels", None, "File of new labels, .jsonl.")
_DELETE = flags.DEFINE_string("delete", None, "Text file with the uids of labels to delete, one per line.")
_CATEGORIES = flags.DEFINE_string(
  "categories", None, "File with uid and categories of labels, .jsonl; they replace the former categories."
)


def main() -> None:
  """Adds, deletes and categorizes the labels that the flags name."""
  import jax

  from vixml_jax.run.bucket_workdir import open_workdir

  if jax.process_count() > 1:
    raise InputError("--distributed: add_labels runs in one process, which uses all of its devices")
  place = cli.place(cli.required(_MODEL.workdir), "workdir")
  if _LABELS.value is None and _DELETE.value is None and _CATEGORIES.value is None:
    raise InputError("--labels: must be given, or --delete, or --categories")
  with open_workdir(place, exists=True) as workdir:
    done = _change(workdir.folder)
  print(f"{place.rstrip('/')}/{INDEX}: {done}")


def _change(workdir: Path) -> str:
  """Changes the labels of a workdir, and returns what was done."""
  from vixml_jax.inference.label_files import NewLabel, label_format, read_categories, read_labels, read_uids
  from vixml_jax.inference.new_labels import change_labels
  from vixml_jax.run import configuration

  delete = read_uids(Path(_DELETE.value)) if _DELETE.value is not None else {}
  categories = read_categories(Path(_CATEGORIES.value)) if _CATEGORIES.value is not None else {}
  labels: list[NewLabel] = []
  predictor = None
  if _LABELS.value is not None:
    labels = read_labels(Path(_LABELS.value), label_format(configuration.read(workdir / CONFIG)))
    predictor = _MODEL.load(folder=workdir)
  index = change_labels(predictor.index if predictor else _open_index(workdir), predictor, labels, delete, categories)
  done = [f"{len(delete)} deleted"] if delete else []
  if labels:
    done.append(f"{len(labels)} added, {sum(bool(label.positives) for label in labels)} of them with positives")
  if categories:
    done.append(f"categories of {len(categories)} set")
  return f"{', '.join(done)}; it has {index.num_live:,} labels"


def _open_index(workdir: Path) -> "LabelIndex":
  """Opens the index of the newest checkpoint. Deleting does not need the model, which may take minutes to load."""
  from vixml_jax.run.checkpoint import checkpoint_id, newest_checkpoint
  from vixml_jax.search.label_index import LabelIndex

  step, _ = newest_checkpoint(workdir / CHECKPOINTS)
  return LabelIndex.open(workdir / INDEX, checkpoint=checkpoint_id(workdir / CHECKPOINTS, step))


if __name__ == "__main__":
  cli.run(main, saved="the label index is as it was, unless it was just replaced")
