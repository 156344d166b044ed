"""Restores the trained model of a workdir for its data set, without writing anything."""

from pathlib import Path

from vixml_jax.run.checkpoint import newest_checkpoint
from vixml_jax.run.checkpoint_arrays import restore_item
from vixml_jax.run.pretrained import check_base
from vixml_jax.run.setup import RunSetup
from vixml_jax.run.state import TrainedModel, abstract_model_part, trained_model
from vixml_jax.run.workdir import CHECKPOINTS


def newest_model(setup: RunSetup, workdir: Path) -> TrainedModel:
  """Returns the model of the newest checkpoint whose model is whole.

  Args:
    setup: the run, initialized up to the definition of its model.
    workdir: folder of the run.

  Raises:
    InputError: there is no whole checkpoint, it does not fit the run, or the frozen encoder is another one.
  """
  folder, num_labels = workdir / CHECKPOINTS, setup.data.num_labels
  step, meta = newest_checkpoint(folder)
  check_base(setup.model, setup.weights_folder, workdir, meta)
  restored = restore_item(folder.absolute(), step, "model", abstract_model_part(setup.model, num_labels, setup.mesh))
  return trained_model(step, meta, restored, num_labels)
