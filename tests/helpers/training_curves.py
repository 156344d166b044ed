"""Trains a config in this process on the first devices, without evaluation, and returns the losses and the state."""

import dataclasses
import json

import jax

from vixml_jax import sharding
from vixml_jax.run.setup import set_up_run
from vixml_jax.run.state import TrainState
from vixml_jax.training.loop import train


@dataclasses.dataclass(frozen=True)
class Curve:
  """What a run without evaluation leaves.

  Attributes:
    steps: Metrics of each step, by name.
    state: Train state at the end, on the host.
    query_clusters: Query clusters of the last update; None without one.
  """

  steps: list[dict[str, float]]
  state: TrainState
  query_clusters: object

  @property
  def losses(self) -> list[float]:
    """Loss of each step."""
    return [values["loss"] for values in self.steps]


class _NoDisk:
  """A checkpointer that keeps the last state on the host."""

  def __init__(self):
    self.step, self.last = None, None

  def save(self, step, checkpoint):
    self.step = step
    self.last = dataclasses.replace(checkpoint, state=jax.device_get(checkpoint.state))

  def latest_step(self):
    return self.step

  last_saved = latest_step

  def wait(self):
    pass

  def reached_preemption(self, step):
    return False


def train_curve(config, workdir, devices=1, **mesh):
  """Trains to the end; `mesh` has the sizes of the mesh over the first `devices`."""
  setup = set_up_run(config, workdir, extract=True)
  mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:devices])
  data = setup.data
  if data.image_features is not None:
    data = dataclasses.replace(data, image_features=data.image_features.placed(mesh, "device"))
  setup = dataclasses.replace(setup, mesh=mesh, data=data)
  kept = _NoDisk()
  train(
    setup.config, workdir, kept, data, setup.load_encoder(), setup.weights_folder, evaluate=lambda model: {}, step=None
  )
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  steps = [line["values"] for line in lines if line["split"] == "train"]
  return Curve(steps, kept.last.state, kept.last.query_clusters)
