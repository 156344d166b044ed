"""Every key of every config has a range, and absurd values of every key are refused in one line."""

import re

import pytest

from configs.encoders import ENCODERS
from tests.helpers.absurd_values import ABSURD, ACCEPTED, changed
from vixml_jax.errors import InputError
from vixml_jax.run import configuration, named_configs
from vixml_jax.run.configuration.ranges import OF_ARCHITECTURES, RANGES, rule_of

_LONGEST = 600  # Characters of an error; the rule of a list of names is the longest.
_ARCHITECTURES = {"bert": "minilm-l6", "decoder": "llama-3.2-1b"}
_OF_QUICKSTART = ("minilm-l6", "qwen2.5-tiny")


def _config(encoder):
  """Returns configs/custom.py with an encoder, unlocked, with a row of `baselines`."""
  config = named_configs.load(f"custom:encoder={encoder}").unlock()
  config.baselines = {"other": {"P@1": 50.0}}
  return config


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", named_configs.config_names())
def test_every_key_of_a_config_has_a_range_and_every_range_a_key(name, encoder):
  if name == "quickstart" and encoder not in _OF_QUICKSTART:
    pytest.skip("the quickstart has two encoders")
  config = named_configs.load(f"{name}:encoder={encoder}")
  ranges = RANGES.keys() | OF_ARCHITECTURES[config.encoder.architecture].keys()
  keys = configuration.flatten_config(config).keys()
  assert {key for key in keys if not key.startswith(("prompt.phrases.", "baselines."))} == ranges
  configuration.check(config)


@pytest.mark.parametrize("name", named_configs.config_names())
@pytest.mark.parametrize("images", [0, 3])
def test_every_config_starts_on_the_devices_of_a_usual_host(name, images):
  """Otherwise a first run on a host with four TPU chips or eight GPUs would end with an error."""
  train = named_configs.load(f"{name}:images={images}").train
  assert train.batch_size % 8 == 0
  assert train.chunk_rows % 8 == 0, "0 is chosen for the devices"


def _refused(key, value, config):
  """Checks that a value is refused in one line that names the key, the value and what is allowed."""
  with pytest.raises(InputError) as caught:
    configuration.check(config)
  line = str(caught.value)
  assert "\n" not in line and len(line) < _LONGEST, line
  assert line.isprintable(), "a terminal must not receive what the value contains"
  assert re.match(rf"config\.{re.escape(key)}(\.[a.]+)?[=:]", line), f"{key}={value!r}: {line}"
  assert "must be" in line or "there is no such key" in line, line


def _walk(encoder):
  """Tries every absurd value of every key. Returns the number of cases and the pairs of value and key in a range."""
  config, cases, accepted = _config(encoder), 0, set()
  for key in configuration.flatten_config(config):
    rule = rule_of(key, config.encoder.architecture)
    for name, value in ABSURD.items():
      cases += 1
      if rule.accepts(value):
        accepted.add((name, key))
        continue
      with changed(config, key, value):
        _refused(key, value, config)
  return cases, accepted


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_absurd_values_of_every_key_are_refused_in_one_line(architecture):
  cases, accepted = _walk(_ARCHITECTURES[architecture])
  keys = configuration.flatten_config(_config(_ARCHITECTURES[architecture])).keys()
  wanted = {(name, key) for name, accepting in ACCEPTED.items() for key in accepting & keys}
  assert accepted == wanted
  assert cases > 100 * len(ABSURD)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_absurd_values_are_refused_with_every_encoder(encoder):
  cases, accepted = _walk(encoder)
  print(f"{encoder}: {cases} cases, {len(accepted)} of them in a range")
  assert cases > 100 * len(ABSURD)


def test_overrides_are_checked_as_well():
  """`vixml_jax.train(**overrides)`, `--config.KEY=VALUE` and studies change a config that has types."""
  values, config = [*ABSURD.items()], named_configs.load("custom")
  for number, key in enumerate(configuration.flatten_config(config)):
    for name, value in (values[(7 * number + step) % len(values)] for step in range(5)):
      if key in ACCEPTED.get(name, ()):
        continue
      with pytest.raises(InputError) as caught:
        configuration.check(named_configs.with_overrides(config, {key: value}))
      line = str(caught.value)
      assert f"config.{key}" in line and "\n" not in line and len(line) < _LONGEST, line


@pytest.mark.parametrize(
  "key,value,problem",
  [
    ("seed", 2**63, r"config\.seed=9223372036854775808: must be a whole number from 0 to 2,147,483,647"),
    pytest.param("seed", 10**5000, r"config\.seed=a number of 16610 bits: must be", id="10^5000"),
    ("train.remat", None, r"config\.train\.remat=None: must be True or False"),
    (
      "mesh.data",
      None,
      r"config\.mesh\.data=None: must be a whole number from 1 to 1,048,576, or -1 for the remaining",
    ),
    ("prototype.dropout", 1e-30, r"config\.prototype\.dropout=1e-30: must be a number from 0\.002 to 0\.998, or 0"),
    ("encoder.pretrained", 7, r"config\.encoder\.pretrained=7: must be a path"),
    ("name", 5000 * "a", r"config\.name='a+\.\.\.a+': must be a path"),
    ("prompt.phrases.T", "\ud800", r"config\.prompt\.phrases\.T='\\ud800': must be empty, or a text"),
    ("train.foo", 1, r"config\.train\.foo=1: there is no such key"),
    ("train.epoch", 1, r"config\.train\.epoch=1: there is no such key; did you mean train\.epochs"),
    ("prompt.phrases.a\0b", "", r"config\.prompt\.phrases\.a\\x00b='': there is no such key"),
    ("train", 7, r"config\.train=7: must be a section with keys such as train\."),
  ],
)
def test_an_error_says_what_is_allowed(key, value, problem):
  config = _config("minilm-l6")
  *sections, name = key.split(".")
  section = config
  for part in sections:
    section = section[part]
  if name in section:
    del section[name]
  section[name] = value
  with pytest.raises(InputError, match=problem):
    configuration.check(config)


@pytest.mark.parametrize(
  "values",
  [
    {"train.batch_size": 2**20, "train.free_vectors": 2**23, "mesh.data": 64, "mesh.fsdp": 64},
    {"dataset.max_length": 8192, "train.row_length": 8192, "encoder.max_position": 8192},
    {"eval.ks": (1, 3, 5, 10, 1000), "eval.recall_ks": (10, 100, 1000), "eval.retrieval_hits": 1000},
    {
      "train.epochs": 10_000,
      "mining.start_epoch": 10_000_000,
      "checkpoint.every_steps": 10**9,
      "checkpoint.keep": 10**6,
    },
    {"train.learning_rate": 1e-6, "train.free_vector_learning_rate": 0.5, "train.weight_decay": 0.3},
    {"dataset.raw_dir": "/mnt/データ/製品 カタログ", "name": "été 2026/نتائج", "eval.bootstrap_samples": 10_000},
    {"prompt.phrases.T": "Instruct: find products\nQuery: ", "prompt.phrases.I": "\u202eimages"},
    {"seed": 123456789, "features.dim": 4096, "train.sampling_a": 1, "dataset.propensity_b": 0.4},
  ],
)
def test_what_users_do_is_allowed(values):
  configuration.check(named_configs.load("custom", **values))
