r"""Compares training with a plain PyTorch transcription of the paper's model and loss on the same batches.

  .venv/bin/python -m benchmarks.parity_torch --config=configs/quickstart.py:images=3 --folder=runs/parity \
      --config.fusion.residual=0 --config.fusion.modality_dropout=0 --config.train.classifier_weight=0 \
      [--steps=50] [--control] [--draws=32] [--seeds=0,1,2]

The transcription is `benchmarks/torch_reference.py`: padded items, the encoder of transformers, the layer of torch,
AdamW of torch, in float32. It reads the encoder's weights itself; the other parameters start with the values that
`vixml_jax` draws. Both sides read the same batches in the same order, and the loss of both compares each row with the
same positive.

With `--steps=N` both sides train side by side for N steps without dropout, and the script prints the losses of each
step and their largest difference. The rates follow the schedule of the config's whole run. Each side makes its label
centroids from its own bank; the query clusters are ours. The loss jumps where a hinge opens or another negative
becomes the hardest, so differences of the size of rounding grow from step to step. `--control` shows how much: it
trains the transcription a second time, with initial parameters changed by one part in ten million. With
`--config.encoder.dtype=bfloat16` only our side changes, so the differences are the effect of that dtype.

With `--draws=N` both sides compute the loss of the first batch N times with dropout, at the initial parameters, and the
script prints the means of its terms with their standard errors. The masks of dropout differ between the sides.

With `--seeds=A,B,...` both sides train by the whole config, dropout included, once for each seed: `vixml_jax` as
`python -m vixml_jax.main` does, in the workdir FOLDER/seed-SEED, and the transcription in a loop of its own. k-means,
label centroids and the formulas of the metrics are those of the package on both sides. The transcription's results are
written to torch.json in the workdir. A finished run is not repeated. The script prints a table of both sides.

Run it on an idle machine; torch needs several times as long as our side.
"""

import json
import os
from pathlib import Path
import time
from typing import Any, NamedTuple

# Idle threads of torch sleep; otherwise they occupy the cores during our side's turn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from absl import flags
from ml_collections import ConfigDict, config_flags
import numpy as np

from benchmarks.parity_sides import JaxTraining, Run, TorchTraining, check_transcribed
from vixml_jax import cli
from vixml_jax.errors import InputError
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.files import write_json
from vixml_jax.run import configuration
from vixml_jax.run.workdir import FINAL_METRICS

_SHOWN = ("P@1", "P@5", "PSP@1", "R@100")
_PARTS = ("loss", "triplet_label", "triplet_prototype", "triplet_reverse", "regulariser")


def compare_steps(
  config: ConfigDict, workdir: Path, steps: int, control: bool = False
) -> dict[str, list[dict[str, float]]]:
  """Trains both sides side by side without dropout, and prints and returns the losses of each step.

  Args:
    config: The whole config; its dropout rates are replaced by 0.
    workdir: Folder for the config of the run.
    steps: Number of steps.
    control: Whether to train a second transcription, whose initial parameters differ by rounding.

  Returns:
    The loss and its terms for each step, under `vixml_jax`, `PyTorch` and, if asked for, `control`.

  Raises:
    InputError: The config's run has fewer steps.
  """
  config = config.copy_and_resolve_references()
  config.encoder.update(dict(dropout=0.0, attention_dropout=0.0, projection_dropout=0.0))
  config.prototype.dropout = 0.0
  run = Run.start(config, workdir)
  if steps > run.total_steps:
    raise InputError(f"--steps={steps}: the config has {run.total_steps} steps; raise config.train.epochs")
  sides = {"PyTorch": TorchTraining(run)}
  if control:
    sides["control"] = TorchTraining(run)
    sides["control"].perturb()
  ours = JaxTraining(run)  # Its first step reuses the memory of the run's state.
  losses = {name: [] for name in ("vixml_jax", *sides)}
  print(f"batches of {config.train.batch_size}, {run.num_steps} steps an epoch, vixml_jax in {config.encoder.dtype}")
  print("step" + "".join(f" {name:>10}" for name in losses) + "  difference" + "  of control" * control)
  clusters, order = None, run.order(0, None)
  for step in range(steps):
    epoch, within = divmod(step, run.num_steps)
    if step and not within:
      clusters = run.clusters_after(epoch - 1, clusters, ours.state.bank)
      order = run.order(epoch, clusters)
      for side in (ours, *sides.values()):
        side.refresh_centroids()
    batch = run.batch(order, step)
    losses["vixml_jax"].append(ours.step(batch))
    for name, side in sides.items():
      losses[name].append(side.step(batch, step))
    found = {name: values[-1]["loss"] for name, values in losses.items()}
    differences = [found[name] - found["PyTorch"] for name in found if name != "PyTorch"]
    cells = [f" {loss:10.6f}" for loss in found.values()] + [f"  {difference:10.1e}" for difference in differences]
    print(f"{step + 1:4}" + "".join(cells), flush=True)
  for name in losses:
    if name != "PyTorch":
      largest = (f"{part} {largest_difference(losses, part, name):.1e}" for part in _PARTS)
      print(f"largest difference of {name} to PyTorch: " + ", ".join(largest))
  return losses


def largest_difference(losses: dict[str, list[dict[str, float]]], part: str, side: str = "vixml_jax") -> float:
  """Returns the largest difference of a part of the loss over the steps of `compare_steps`, to the transcription."""
  return max(abs(ours[part] - theirs[part]) for ours, theirs in zip(losses[side], losses["PyTorch"], strict=True))


def compare_draws(config: ConfigDict, workdir: Path, draws: int) -> dict[str, float]:
  """Computes the loss of the first batch with dropout many times on both sides, and prints the means of its terms.

  Args:
    config: The whole config.
    workdir: Folder for the config of the run.
    draws: Number of draws of each side.

  Returns:
    For each term the difference of the sides' means, in units of its standard error.
  """
  run = Run.start(config, workdir)
  batch = run.batch(run.order(0, None), 0)
  sides = {"vixml_jax": JaxTraining(run), "PyTorch": TorchTraining(run)}
  found = {}
  for name, side in sides.items():
    drawn = [[parts[part] for part in _PARTS] for parts in side.losses(batch, range(draws))]
    means, errors = np.mean(drawn, axis=0), np.std(drawn, axis=0, ddof=1) / np.sqrt(draws)
    found[name] = means, errors
    cells = (f"{part} {mean:.5f} ± {error:.5f}" for part, mean, error in zip(_PARTS, means, errors, strict=True))
    print(f"{name}, {draws} draws: " + ", ".join(cells), flush=True)
  (ours, our_errors), (theirs, their_errors) = found.values()
  differences = (ours - theirs) / np.hypot(our_errors, their_errors)
  return dict(zip(_PARTS, map(float, differences), strict=True))


def train_transcription(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Trains the transcription by a whole config and returns its metrics, mean loss of each epoch, and seconds.

  Args:
    config: The whole config.
    workdir: Folder for the config of the run.
  """
  run = Run.start(config, workdir)
  side, clusters, means = TorchTraining(run), None, []
  started = time.monotonic()
  for epoch in range(run.config.train.epochs):
    order, losses = run.order(epoch, clusters), []
    for step in range(epoch * run.num_steps, (epoch + 1) * run.num_steps):
      losses.append(side.step(run.batch(order, step), step)["loss"])
    clusters = run.clusters_after(epoch, clusters, side.bank)
    side.refresh_centroids()
    means.append(float(np.mean(losses)))
    print(f"PyTorch, seed {run.config.seed}, epoch {epoch + 1}: mean loss {means[-1]:.4f}", flush=True)
  seconds = time.monotonic() - started
  return side.evaluate() | {"mean_losses": means, "train_seconds": seconds}


def train_both(config: ConfigDict, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
  """Trains both sides with a seed, where the folder has no results yet, and returns their results.

  Raises:
    InputError: The folder has results of another config.
  """
  config = config.copy_and_resolve_references()
  config.seed = seed
  workdir = folder / f"seed-{seed}"
  path = workdir / "torch.json"
  if not (workdir / FINAL_METRICS).is_file():
    train_and_evaluate(config, workdir)
  ours = json.loads((workdir / FINAL_METRICS).read_text("utf-8")) | {"mean_losses": _mean_losses(workdir)}
  recipe = json.loads(json.dumps(config.to_dict()))
  if not path.is_file():
    write_json(path, train_transcription(config, workdir) | {"config": recipe})
  theirs = json.loads(path.read_text("utf-8"))
  if theirs["config"] != recipe:
    raise InputError(f"{path}: was made with another config; use another --folder")
  return {"vixml_jax": ours, "PyTorch": theirs}


def table(results: dict[int, dict[str, dict[str, Any]]]) -> str:
  """Returns the results of `train_both` by seed as a Markdown table, with means and standard deviations."""
  lines = [["side and seed", *_SHOWN, "mean loss of the epochs", "seconds"]]
  lines.append(["---", *["---:"] * len(_SHOWN), "---", "---:"])
  for side in ("vixml_jax", "PyTorch"):
    for seed, found in results.items():
      row = found[side]
      losses = " ".join(f"{loss:.3f}" for loss in row["mean_losses"])
      lines.append(
        [f"{side}, seed {seed}", *(f"{row[name]:.2f}" for name in _SHOWN), losses, f"{row['train_seconds']:.0f}"]
      )
    if len(results) > 1:
      values = {name: [found[side][name] for found in results.values()] for name in _SHOWN}
      cells = [f"{np.mean(value):.2f} ± {np.std(value, ddof=1):.2f}" for value in values.values()]
      lines.append([f"{side}, mean of {len(results)}", *cells, "", ""])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Flags(NamedTuple):
  """The flags, which are defined only where this file is the program."""

  config: flags.FlagHolder
  folder: flags.FlagHolder
  steps: flags.FlagHolder
  control: flags.FlagHolder
  draws: flags.FlagHolder
  seeds: flags.FlagHolder


def define_flags() -> Flags:
  """Defines the flags of the command."""
  return Flags(
    config_flags.DEFINE_config_file("config", None, "Config; a variant follows a colon."),
    flags.DEFINE_string("folder", None, "Folder for workdirs and results."),
    flags.DEFINE_integer("steps", 50, "Steps that both sides train side by side without dropout; 0 for none."),
    flags.DEFINE_bool("control", False, "Also compare the transcription with itself after a change by rounding."),
    flags.DEFINE_integer("draws", 0, "Draws of dropout on each side for the loss of the first batch; 0 for none."),
    flags.DEFINE_string("seeds", "", "Seeds of whole trainings of both sides; empty for none."),
  )


def main(given: Flags) -> None:
  """Runs the comparisons and prints them."""
  config, folder = cli.required(given.config), Path(cli.required(given.folder))
  configuration.check(config)
  check_transcribed(config)
  seeds = cli.numbers(given.seeds) if given.seeds.value else []
  if given.steps.value:
    compare_steps(config, folder / "steps", given.steps.value, given.control.value)
  if given.draws.value:
    compare_draws(config, folder / "draws", given.draws.value)
  if seeds:
    results = {}
    for seed in seeds:
      results[seed] = train_both(config, folder, seed)
      print(table(results), flush=True)


def _mean_losses(workdir: Path) -> list[float]:
  """Returns the mean loss of each epoch of a finished run."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text("utf-8").splitlines())
  return [line["values"]["mean_loss"] for line in lines if line["split"] == "epoch"]


if __name__ == "__main__":
  _given = define_flags()
  cli.run(lambda: main(_given))
