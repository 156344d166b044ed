"""Starts runs on a miniature with extreme values of the keys of a config, and says how each ends."""

import contextlib
import math
import multiprocessing
from multiprocessing import forkserver
from multiprocessing.connection import Connection
import os
from pathlib import Path
import resource

import pytest

from tests.helpers.absurd_values import changed
from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import miniature_config
from vixml_jax import datasets, experiment
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.run import configuration
from vixml_jax.run.configuration import rules
from vixml_jax.run.configuration.ranges import rule_of
from vixml_jax.stages import Callback, StopTraining, reporting

MOST_SECONDS = 120
MOST_BYTES = 6 * 2**30
TRAINED = "trained"
ENCODERS = {"texts": "minilm-l6", "images": "minilm-l6", "decoder": "qwen2.5-0.5b"}
"""Kind of a run -> its encoder."""

# Keys that every kind of run has are tried with texts only.
_OF_IMAGES = ("images", "features.", "fusion.", "prompt.", "eval.test_images")


def extremes(rule):
  """Returns the values at the ends of what a rule accepts, and for words all of them."""
  if isinstance(rule, rules.Whole):
    high = (
      2 ** (rule.high.bit_length() - 1) if rule.power_of_two else rule.high - rule.high % 2 if rule.even else rule.high
    )
    return [*(number for number, _ in rule.also), rule.low, high]
  if isinstance(rule, rules.Number):
    low = math.nextafter(rule.low, rule.high) if rule.above_low else float(rule.low)
    high = math.nextafter(rule.high, rule.low) if rule.below_high else float(rule.high)
    return [*map(float, rule.also), low, high]
  if isinstance(rule, rules.Flag):
    return [False, True]
  if isinstance(rule, rules.Choice):
    return list(rule.names)
  if isinstance(rule, rules.Text):
    return ["" if not rule.least else "a", rule.most * "\u202e"]
  if isinstance(rule, rules.Place):
    return [*([""] if rule.empty else []), "/".join(7 * [250 * "a"]) if rule.inner else 255 * "a", "\u202e"]
  if isinstance(rule, rules.Pattern):
    return ["", *(["1:1", "9999999999:9999999999"] if rule.ascending else ["http://" + 2000 * "a"])]
  if isinstance(rule, rules.Several):
    items = extremes(rule.item)
    full = sorted({*items, *range(1, rule.most)}, reverse=True) if isinstance(rule.item, rules.Whole) else items
    return [*([()] if not rule.least else []), *((item,) for item in items), tuple(full[: rule.most])]
  return [(), (1e-9, 1e-9, 1e9, 1e9), (1e9, 1e-9, 1e9, 1e-9)]


def cases_of(kind, config):
  """Returns the (key, value) pairs that a kind of run tries."""
  encoder, architecture = ENCODERS[kind], config.encoder.architecture
  del encoder
  cases = []
  for key in sorted(configuration.flatten_config(config)):
    if kind == "decoder" and not key.startswith("encoder."):
      continue
    if (kind == "images") != key.startswith(_OF_IMAGES) and kind != "decoder":
      continue
    rule = rule_of(key, architecture)
    for value in extremes(rule):
      assert rule.accepts(value), f"{key}={value!r}: is not in the range that it is the end of"
      if value != configuration.flatten_config(config)[key]:
        cases.append((key, value))
  return cases


def base_config(kind, folder):
  """Returns the config of a miniature that trains in one step, and evaluates little."""
  config = miniature_config(folder, ENCODERS[kind], num_train=16, num_test=4, num_labels=8)
  config.train.update(dict(epochs=1, batch_size=16))
  config.dataset.validation_fraction = 0.0
  config.eval.update(dict(retrieval_choose=False, blend=False, baselines=(), bootstrap_samples=2))
  if kind == "images":
    config.images = 2
    builder = datasets.prepare(config.dataset.name, config.dataset.raw_dir, config.dataset.data_dir)
    write_random_features(builder, config.dataset.data_dir, config.features.name, 6)
    config.features.dim = 6
  return config


class _OneStep(Callback):
  """Ends a run after its first step."""

  def on_step(self, step, metrics):
    raise StopTraining


class Trials:
  """Tries values, each in a fork of a process that has imported everything.

  So memory that a case leaves behind, or a device that waits for others whose program failed, does not reach the next.
  """

  def __init__(self):
    self._context = multiprocessing.get_context("forkserver")
    self._context.set_forkserver_preload(["vixml_jax.experiment", __name__])
    with pytest.MonkeyPatch.context() as patch:
      # Eight devices would hold everything eight times.
      patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("_device_count=8", "_device_count=1"))
      forkserver.ensure_running()

  def try_value(self, config, key, value, trained, folder):
    """Starts a run with a value, and returns `TRAINED`, or the line of the error.

    Args:
      config: Config of the miniature.
      key: The key.
      value: Its value.
      trained: Workdir of a run with `config`, which is evaluated again for keys of the evaluation.
      folder: Folder for the workdir of another run.

    Raises:
      AssertionError: It is neither trained nor refused in one line within the limits of time and memory: a bug.
    """
    receiver, sender = self._context.Pipe(duplex=False)
    process = self._context.Process(target=_try_value, args=(sender, config, key, value, trained, folder))
    process.start()
    sender.close()
    try:
      assert receiver.poll(MOST_SECONDS), f"more than {MOST_SECONDS} s"
      refused, line = receiver.recv()
    except EOFError:
      process.join()
      raise AssertionError(f"the process ended with {process.exitcode}") from None
    finally:
      process.kill()
      process.join()
      receiver.close()
    assert refused or line == TRAINED, line
    assert "\n" not in line, line
    return line


def _try_value(sender: Connection, config, key, value, trained, folder) -> None:
  """Sends whether the value was refused, and the line, `TRAINED` or the exception."""
  _limit_memory()
  os.chdir(folder.parent)  # Some values are relative paths.
  try:
    with changed(config, key, value), reporting(_OneStep()):
      configuration.check(config)
      if key.startswith("eval."):
        evaluate_workdir(config, trained)
      else:
        with _without_evaluation():
          train_and_evaluate(config, folder)
    sender.send((False, TRAINED))
  except InputError as error:
    sender.send((True, str(error)))
  except BaseException as error:
    sender.send((False, repr(error)))


@contextlib.contextmanager
def _without_evaluation():
  """Leaves out the evaluation at the end of a run, which keys of training do not change."""
  before = experiment._evaluate_and_write
  experiment._evaluate_and_write = lambda *args: {}
  try:
    yield
  finally:
    experiment._evaluate_and_write = before


def _limit_memory() -> None:
  """Limits the bytes that the process may add."""
  used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
  resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
