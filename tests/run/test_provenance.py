"""The provenance of a run: entries, secrets, damage, revisions of a checkout and of an installed wheel."""

import json
import subprocess

import pytest

import vixml_jax
from vixml_jax.errors import InputError
from vixml_jax.run import provenance
from vixml_jax.run.environment import describe_environment, package_versions, source_revision

META = {"data_fingerprint": "d" * 64, "weights_sha256": {"model.safetensors": "w" * 64}, "tokens": 7}


def test_a_start_has_command_hashes_versions_devices_and_flags(tmp_path, monkeypatch):
  monkeypatch.setattr("sys.orig_argv", ["python", "-m", "vixml_jax.main", "--workdir=my run"])
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--quick")
  monkeypatch.setenv("HF_TOKEN", "secret")
  provenance.record_start(tmp_path, META)
  (start,) = provenance.read_starts(tmp_path)
  assert start["command"] == "python -m vixml_jax.main '--workdir=my run'"
  assert start["data_fingerprint"] == META["data_fingerprint"] and start["weights_sha256"] == META["weights_sha256"]
  environment = start["environment"]
  assert environment["packages"]["jax"] and environment["packages"]["vixml_jax"] == vixml_jax.__version__
  assert environment["devices"] == "8 x cpu (cpu)" and environment["processes"] == 1
  assert environment["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
  assert environment["variables"]["LIBTPU_INIT_ARGS"] == "--quick"
  assert "secret" not in (tmp_path / "provenance.json").read_text()
  lines = dict(provenance.provenance_lines(start))
  assert lines["weights"] == "model.safetensors " + "w" * 64 and lines["data"] == "d" * 64
  assert f"vixml_jax {vixml_jax.__version__}" in lines["packages"]


def test_equal_starts_are_one_entry_and_others_are_added(tmp_path, monkeypatch):
  for command in ("first", "first", "first", "second", "first"):
    monkeypatch.setattr("sys.orig_argv", [command])
    provenance.record_start(tmp_path, META)
  starts = provenance.read_starts(tmp_path)
  assert [(start["command"], start["times"]) for start in starts] == [("first", 3), ("second", 1), ("first", 1)]
  assert "3 times until" in dict(provenance.provenance_lines(starts[0]))["started"]


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  provenance.record_start(tmp_path, META)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"starts": [{"command": "x"}]}', "{\x00"])
def test_a_damaged_file_is_named_and_the_next_start_begins_anew(text, tmp_path, caplog):
  (tmp_path / "provenance.json").write_text(text)
  with pytest.raises(InputError, match=r"provenance\.json: "):
    provenance.read_starts(tmp_path)
  provenance.record_start(tmp_path, META)
  assert len(provenance.read_starts(tmp_path)) == 1
  assert "provenance.json" in caplog.text


SECRET = "s3cr3t"


@pytest.mark.parametrize(
  "words",
  [
    [f"--api_key={SECRET}"],
    ["--api_key", SECRET],
    [f"--config.track.token={SECRET}"],
    [f"-password={SECRET}"],
    [f"--config.track.mlflow_uri=https://me:{SECRET}@host:1/path"],
    [f"--workdir=gs://bucket/run?access_token={SECRET}&x=1"],
    [f"https://host/a?X-Goog-Signature={SECRET}"],
  ],
)
def test_secrets_are_not_stored(words):
  told = provenance.command_line(["vixml", "train", *words, "--config=quickstart"])
  assert SECRET not in told and "***" in told
  assert told.startswith("vixml train ") and told.endswith(" --config=quickstart")


def test_flags_without_secrets_and_long_programs():
  words = ["python", "--config.train.tokens_per_row=3", "--config.tokenizer=x", "--config.dataset.raw_dir=/a b/'c'"]
  assert provenance.command_line(words).endswith(
    """tokens_per_row=3 --config.tokenizer=x '--config.dataset.raw_dir=/a b/'"'"'c'"'"''"""
  )
  assert len(provenance.command_line(["python", "-c", "x" * 10**6])) < 1100


def _git(folder, *arguments):
  who = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
  return subprocess.run(
    ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
  ).stdout.strip()


def test_the_revision_of_a_checkout_says_whether_its_files_are_changed(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  (source / "a.py").write_text("1")
  (tmp_path / ".gitignore").write_text("*.log")
  (tmp_path / "notes").write_text("1")
  _git(tmp_path, "init", "--quiet")
  _git(tmp_path, "add", ".")
  _git(tmp_path, "commit", "--quiet", "--message=first")
  commit = _git(tmp_path, "rev-parse", "HEAD")
  (tmp_path / "notes").write_text("2")
  (source / "run.log").write_text("ignored")
  assert source_revision(source) == commit
  (source / "new.py").write_text("1")
  assert source_revision(source) == f"{commit}, changed"
  (source / "new.py").unlink()
  (source / "a.py").write_text("2")
  assert source_revision(source) == f"{commit}, changed"


@pytest.mark.parametrize("inside", [False, True], ids=["without git", "in another repository, which ignores it"])
def test_an_installed_package_has_its_version_instead_of_a_revision(inside, tmp_path):
  packages = tmp_path / "packages"
  packages.mkdir()
  (packages / "a.py").write_text("1")
  if inside:
    _git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("packages\n")
  assert source_revision(packages) == f"version {vixml_jax.__version__}, no checkout"


def test_versions_are_those_of_installed_packages():
  versions = package_versions()
  assert {"jax", "jaxlib", "numpy", "tokenizers", "lightgbm"} <= versions.keys()
  assert json.dumps(describe_environment())
