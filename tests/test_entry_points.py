"""Bad input ends every entry point with one line on stderr and status 1, without a traceback."""

from pathlib import Path

import pytest

from tests.helpers.miniature import write_tokenizer
from tests.helpers.miniature_runs import run_commands

_CUSTOM = "--config=configs/custom.py"
# Name -> command line, and what its line must name.
_CASES = {
  "unknown key": (("main", _CUSTOM, "--config.train.epoch=3"), "train.epoch"),
  "unknown section": (("main", _CUSTOM, "--config.trian.epochs=3"), "trian"),
  "wrong type": (("main", _CUSTOM, "--config.train.epochs=three"), "train.epochs"),
  "value out of range": (("main", _CUSTOM, "--config.train.epochs=-1"), "train.epochs"),
  "word among numbers": (("main", _CUSTOM, "--config.eval.ks=all"), "eval.ks"),
  "steps that are no range": (("main", _CUSTOM, "--profile=3"), "profile.steps='3': must be empty, or FIRST:LAST"),
  "steps twice": (("main", _CUSTOM, "--profile=3:4", "--config.profile.steps=5:6"), "--profile and --config.profile"),
  "no config": (("main",), "--config"),
  "no config to prepare": (("prepare_data",), "--config"),
  "no such config file": (("main", "--config=configs/nothing.py"), "configs/nothing.py"),
  "no such config file, with a value": (
    ("main", "--config=configs/nothing.py", "--config.train.epochs=3"),
    "configs/nothing.py",
  ),
  "no such config": (("main", "--config=quickstrat"), "did you mean quickstart?"),
  "no such key of a config by its name": (("main", "--config=quickstart:images=3", "--config.seeds=1"), "seeds"),
  "value before its config": (("main", "--config.train.epochs=3", _CUSTOM), "--config.train.epochs"),
  "unknown variant": (("main", f"{_CUSTOM}:encoder=gpt"), "encoder=gpt"),
  "error in a config file": (("main", "--config={folder}/broken.py"), "broken.py, line 1"),
  "unknown flag": (("main", _CUSTOM, "--wrokdir=x"), "wrokdir"),
  "positional argument": (("main", _CUSTOM, "quickly"), "quickly"),
  "no such raw folder": (
    (
      "main",
      _CUSTOM,
      "--config.dataset.raw_dir={folder}/no_raw",
      "--config.dataset.data_dir={folder}/data",
      "--config.encoder.pretrained={folder}/tokenizer",
      "--config.encoder.random_init=True",
      "--workdir={folder}/run",
    ),
    "{folder}/no_raw",
  ),
  "no tokenizer": (("main", _CUSTOM, "--config.encoder.pretrained={folder}"), "{folder}: has no config.json"),
  "no such raw folder to prepare": (
    ("prepare_data", _CUSTOM, "--config.dataset.raw_dir={folder}/no_raw", "--config.dataset.data_dir={folder}/data"),
    "{folder}/no_raw",
  ),
  "workdir without config": (("evaluate", "--workdir={folder}"), "{folder}/config.json"),
  "no workdir": (("evaluate",), "--workdir"),
  "no workdir to predict with": (("predict",), "--workdir"),
  "no label to predict": (("predict", "--workdir={folder}", "--k=0"), "--k=0"),
  "workdir without config to predict with": (
    ("predict", "--workdir={folder}", "--queries=q.jsonl", "--output={folder}/o.jsonl"),
    "{folder}/config.json",
  ),
  "no workdir to add labels to": (("add_labels",), "--workdir"),
  "nothing to add": (("add_labels", "--workdir={folder}"), "--labels"),
  "no workdir to export": (("export",), "--workdir"),
  "unknown format": (("export", "--workdir={folder}", "--format=pickle", "--output=x"), "--format=pickle"),
  "format without that dtype": (
    ("export", "--workdir={folder}", "--format=peft", "--dtype=int8", "--output={folder}/x"),
    "--dtype=int8",
  ),
  "unknown encoder": (("predict", "--workdir={folder}", "--encoder=int4"), "--encoder=int4"),
  "no workdir to serve": (("serve",), "--workdir"),
  "no such workdir to serve": (("serve", "--workdir={folder}/nothing"), "{folder}/nothing: no such folder"),
  "unknown rankings": (("serve", "--workdir={folder}", "--rankings=plain,best"), "--rankings=plain,best"),
  "ranking that is not offered": (
    ("serve", "--workdir={folder}", "--ranking=blend", "--rankings=plain"),
    "--ranking=blend: must be one of --rankings=plain",
  ),
  "no file of keys": (("serve", "--workdir={folder}", "--api_key_file={folder}/keys"), "--api_key_file={folder}/keys"),
  "no origin": (("serve", "--workdir={folder}", "--cors_origins=shop.example"), "--cors_origins=shop.example"),
  "no name of a host": (("serve", "--workdir={folder}", "--allowed_hosts=a/b"), "--allowed_hosts=a/b"),
  "unknown format of the log": (("serve", "--workdir={folder}", "--log_format=xml"), "--log_format=xml"),
  "no such port": (("serve", "--workdir={folder}", "--port=70000"), "--port=70000"),
  "workdir without config to compare": (("evaluate", "--workdir={folder}", "--compare={folder}/b"), "{folder}"),
  "unknown search": (("evaluate", "--workdir={folder}", "--search=faiss"), "--search=faiss"),
  "no topology": (("aot_compile", _CUSTOM), "--topology"),
  "unknown topology": (("aot_compile", "--config=configs/lf_amazon_1.3m.py", "--topology=v5e:x"), "--topology=v5e:x"),
  "a workdir in the home folder": (("evaluate", "--workdir=~/no_run"), f"{Path.home()}/no_run/config.json"),
  "no port of a coordinator": (
    ("main", _CUSTOM, "--coordinator=host:0", "--num_processes=2", "--process=1"),
    "--coordinator='host:0': must be HOST:PORT",
  ),
  "no cluster": (("main", _CUSTOM, "--distributed"), "--distributed: JAX detects no cluster here"),
  "nothing to describe": (("describe",), "--config: must be given, or --workdir"),
  "two things to describe": (("describe", _CUSTOM, "--workdir={folder}"), "and not both"),
  "data set of an unknown size": (
    ("describe", _CUSTOM, "--config.dataset.data_dir={folder}/none"),
    "give --num_queries and --num_labels",
  ),
  "mesh of other devices": (
    ("describe", "--config=quickstart", "--config.mesh.fsdp=3", "--devices=4"),
    "does not equal the number of devices, 4",
  ),
  "no folder for a description": (
    ("describe", "--config=quickstart", "--json={folder}/none/d.json"),
    "{folder}/none/d.json: cannot be written",
  ),
  "tokens out of range": (
    ("aot_compile", "--config=configs/lf_amazon_1.3m.py", "--topology=v5e:2x2", "--tokens_per_item=99"),
    "--tokens_per_item=99",
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("entry_points")


@pytest.fixture(scope="module")
def results(folder):
  """Name -> exit status, stdout and stderr of every case."""
  (folder / "broken.py").write_text("def get_config(:\n")
  write_tokenizer(folder / "tokenizer")
  (folder / "tokenizer" / "config.json").write_text("{}")
  commands = {name: [part.format(folder=folder) for part in command] for name, (command, _) in _CASES.items()}
  return run_commands(commands, folder)


@pytest.mark.parametrize("name", _CASES)
def test_bad_input_is_one_line_and_status_1(name, results, folder):
  status, stdout, stderr = results[name]
  assert status == 1, stderr
  assert not stdout
  lines = stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), stderr
  assert "Traceback" not in stderr
  assert _CASES[name][1].format(folder=folder) in lines[0]
  assert len(lines[0]) < 400
