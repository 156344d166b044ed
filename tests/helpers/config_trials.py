"""Starts runs on a miniature with extreme values of the keys of a config, and says how each ends."""

import contextlib
import math
import os
from pathlib import Path
import resource
import signal

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
    return [*([""] if rule.empty else []), "/".join(7 * [250 * "a"]) if rule.inner else 255 * "a", "\u202e", "~nobody"]
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


def try_value(config, key, value, trained, folder):
  """Starts a run with a value, and returns `TRAINED`, or the line of the error.

  Args:
    config: Config of the miniature.
    key: The key.
    value: Its value.
    trained: Workdir of a run with `config`, which is evaluated again for keys of the evaluation.
    folder: Folder for the workdir of another run.

  Raises:
    Exception: What is not an `InputError` of one line, within the limits of time and memory, is a bug.
  """
  evaluates = key.startswith("eval.")
  with changed(config, key, value), _limited(), reporting(_OneStep()):
    try:
      configuration.check(config)
      if evaluates:
        evaluate_workdir(config, trained)
      else:
        with _without_evaluation():
          train_and_evaluate(config, folder)
    except InputError as error:
      assert "\n" not in str(error), error
      return str(error)
  return TRAINED


@contextlib.contextmanager
def _without_evaluation():
  """Leaves out the evaluation at the end of a run, which keys of training do not change."""
  before = experiment._evaluate_and_write
  experiment._evaluate_and_write = lambda *args: {}
  try:
    yield
  finally:
    experiment._evaluate_and_write = before


@contextlib.contextmanager
def _limited():
  """Limits the seconds and the bytes that the block may add."""

  def stop(number, frame):
    raise TimeoutError(f"more than {MOST_SECONDS} s")

  used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
  limits, handler = resource.getrlimit(resource.RLIMIT_DATA), signal.signal(signal.SIGALRM, stop)
  resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, limits[1]))
  signal.alarm(MOST_SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_DATA, limits)
