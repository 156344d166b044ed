"""Commands refuse absurd values, damaged files of configs and other recipes in one line, without a traceback."""

import json

import pytest

from tests.helpers.miniature_runs import run_commands
from vixml_jax.run import configuration, named_configs

_CUSTOM = "--config=configs/custom.py"
_DEEP = 20_000

# config.json of a workdir -> what the line of every command that reads it must name.
_FILES = {
  "a list": ("[]", "is not a JSON object"),
  "deep lists": (_DEEP * "[", "nested too deep"),
  "deep objects": (_DEEP * '{"train":' + "1" + _DEEP * "}", "nested too deep"),
  "a number": ({"encoder.pretrained": 7}, "config.encoder.pretrained=7: must be a path"),
  "an infinity": ({"train.learning_rate": float("inf")}, "config.train.learning_rate=inf: must be a number"),
  "no number": ({"mesh.data": None}, "config.mesh.data=None: must be a whole number"),
  "a key too many": ({"train.epoch": 3}, "config.train.epoch=3: there is no such key; did you mean train.epochs?"),
}
_READERS = {
  "evaluate": ("evaluate",),
  "predict": ("predict", "--queries={folder}/q.jsonl", "--output={folder}/o.jsonl"),
  "export": ("export", "--format=hf", "--output={folder}/x"),
}
# Value of a flag -> what the line must name.
_FLAGS = {
  "--config.seed=9223372036854775808": "config.seed=9223372036854775808: must be a whole number from 0 to 2,147,",
  "--config.seed=-1": "config.seed=-1: must be",
  "--config.train.learning_rate=nan": "config.train.learning_rate=nan: must be a number",
  "--config.train.learning_rate=1e3": "config.train.learning_rate=1000.0: must be a number",
  "--config.loss.temperature=inf": "config.loss.temperature=inf: must be a number",
  "--config.train.batch_size=2147483648": "config.train.batch_size=2147483648: must be",
  "--config.train.chunk_rows=2147483648": "config.train.chunk_rows=2147483648: must be",
  "--config.eval.ks=2147483648": "config.eval.ks=(2147483648,): must be a list",
  "--config.eval.bootstrap_samples=2147483648": "config.eval.bootstrap_samples=2147483648: must be",
  "--config.mesh.data=None": "config.mesh.data='None': must be a whole number from 1 to 1,048,576, or -1",
  "--config.train.remat=None": "config.train.remat='None': must be True or False",
  "--config.train.remat=2": "config.train.remat='2': must be True or False",
  "--config.prototype.dropout=1e-30": "config.prototype.dropout=1e-30: must be",
  "--config.name=": "config.name='': must be a path",
  f"--config.name={5000 * 'a'}": "config.name='aaaa",
  f"--config.dataset.data_dir={5000 * 'a'}": "config.dataset.data_dir='aaaa",
  f"--workdir={5000 * 'a'}": "--workdir='aaaa",
  "--workdir=~nobody/run": "--workdir='~nobody/run': it starts with ~",
  "--config.dataset.data_dir=~nobody": "config.dataset.data_dir='~nobody': must be a path that can be written, without",
  f"--config.seed={5000 * '9'}": "config.seed='999",
  "--config.encoder.max_position=16": "config.dataset.max_length=32: must be at most config.encoder.max_position=16",
  "--config.mesh.tensor=-1": "config.mesh.data=-1: must be a number, since config.mesh.tensor=-1",
}


def _lines(results):
  """Returns the line that each command ended with, by its name."""
  for name, (status, stdout, stderr) in results.items():
    assert status == 1 and not stdout, f"{name}: {stderr}"
    (line,) = stderr.splitlines()
    assert line.startswith("error: ") and len(line) < 600, line
  return {name: stderr.strip() for name, (_, _, stderr) in results.items()}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
  """The line of each command, by its name: a flag, or (command, file of a config)."""
  folder = tmp_path_factory.mktemp("configs")
  (folder / "q.jsonl").write_text('{"uid": "a", "title": "b"}\n')
  commands = {flag: ["main", _CUSTOM, flag] for flag in _FLAGS}
  commands["vixml train"] = ["__main__", "train", _CUSTOM, "--config.seed=-1"]
  for command in ("prepare_data", "aot_compile", "describe"):
    commands[command] = [command, _CUSTOM, "--config.seed=-1", *(["--topology=v5e:2x2"] * (command == "aot_compile"))]
  commands["study"] = ["study", "--study=seeds", _CUSTOM, "--config.seed=2147483647", f"--output={folder}/study"]
  for number, (name, (content, _)) in enumerate(_FILES.items()):
    workdir = folder / f"run{number}"
    workdir.mkdir()
    config = configuration.flatten_config(named_configs.load("custom")) if isinstance(content, dict) else {}
    (workdir / "config.json").write_text(content if isinstance(content, str) else json.dumps(_nested(config | content)))
    readers = _READERS if number in (0, 2, 3) else {"evaluate": _READERS["evaluate"]}
    for command, arguments in readers.items():
      given = [argument.format(folder=folder) for argument in arguments]
      commands[f"{command} {name}"] = [*given, f"--workdir={workdir}"]
  return _lines(run_commands(commands, folder))


def _nested(values):
  """The inverse of `flatten_config`."""
  result = {"baselines": {}}
  for key, value in values.items():
    *sections, name = key.split(".")
    section = result
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = value
  return result


@pytest.mark.parametrize("flag", _FLAGS, ids=lambda flag: flag[:40])
def test_an_absurd_flag_is_refused(flag, lines):
  assert _FLAGS[flag] in lines[flag]


def test_every_command_checks_its_config(lines):
  for command in ("vixml train", "prepare_data", "aot_compile", "describe"):
    assert "config.seed=-1: must be a whole number from 0 to" in lines[command]
  assert "study seeds, run 'as configured': config.seed=2147483648: must be" in lines["study"]


@pytest.mark.parametrize("name", _FILES)
def test_every_command_refuses_a_damaged_file(name, lines):
  found = [line for key, line in lines.items() if key.endswith(f" {name}")]
  assert found
  for line in found:
    assert "config.json: " in line and _FILES[name][1] in line, line
