"""The log of a run in its workdir, and the share of its time that training steps took."""

import json
import logging
import time

import jax
import jax.numpy as jnp
import pytest

from vixml_jax.errors import InputError
from vixml_jax.run.goodput import KINDS, Goodput, current_shares, kind_of
from vixml_jax.run.run_log import recorded
from vixml_jax.stages import reporting, stage

_log = logging.getLogger("vixml_jax.experiment")


@recorded
def run(config, workdir):
  _log.info("before the workdir")
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text("{}")
  with stage("train", total=2, unit="step", logged=False):
    time.sleep(0.2)
    with stage("save a checkpoint", logged=False):
      time.sleep(0.1)
  with stage("tokenize train", logged=False):
    time.sleep(0.1)
  if config == "bad":
    raise InputError("config.x=1: must be 2")
  return current_shares()


def test_a_workdir_has_every_line_of_all_starts_and_the_goodput_of_all(tmp_path):
  shares = run(None, tmp_path / "run")
  assert shares["steps"] > shares["checkpoint"] > 0.1 and shares["data"] > 0.1
  assert sum(shares[kind] for kind in KINDS) == pytest.approx(1)
  with pytest.raises(InputError):
    run("bad", tmp_path / "run")
  lines = [line.split(" ", 2)[2] for line in (tmp_path / "run/log.txt").read_text().splitlines()]
  assert lines[0] == "before the workdir" and lines[1].startswith("goodput: ")
  assert lines[2:] == ["before the workdir", "ended: config.x=1: must be 2"]
  seconds = json.loads((tmp_path / "run/goodput.json").read_text())
  assert 0.35 < seconds["steps"] < 5, "the steps of both starts"
  assert current_shares() == {}


def test_the_log_has_lines_that_the_terminal_does_not_show(tmp_path, caplog):
  caplog.set_level("WARNING")
  run(None, tmp_path / "run")
  assert caplog.messages == [] and "before the workdir" in (tmp_path / "run/log.txt").read_text()
  logger = logging.getLogger("vixml_jax")
  assert logger.propagate and not [handler for handler in logger.handlers if "run_log" in type(handler).__module__]


def test_nothing_is_written_before_the_run_has_its_workdir(tmp_path):
  @recorded
  def refused(config, workdir):
    raise InputError("no")

  with pytest.raises(InputError):
    refused(None, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_compilation_counts_by_itself_and_not_for_its_stage(tmp_path):
  with Goodput(tmp_path) as goodput, reporting(goodput), stage("train", logged=False):
    jax.jit(lambda x: jnp.sin(x) @ x.T + len(str(tmp_path)))(jnp.ones((8, 8))).block_until_ready()
  shares = goodput.shares()
  assert shares["compile"] > 0 and sum(shares[kind] for kind in KINDS) == pytest.approx(1)


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("train", "steps"),
    ("encode 294,805 labels", "mining"),
    ("encode 10 test queries", "evaluation"),
    ("divide 10 rows into 4 clusters", "mining"),
    ("prepare train", "data"),
    ("evaluate 10 queries", "evaluation"),
    ("write the label index", "evaluation"),
  ],
)
def test_every_stage_has_a_kind_of_time(name, kind):
  assert kind_of(name) == kind


def test_a_trained_workdir_has_a_log_goodput_and_readable_files(texts_only):
  workdir = texts_only.workdir
  assert "goodput: " in (workdir / "log.txt").read_text()
  splits = [json.loads(line)["split"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert "goodput" in splits
  # Others may read what a run writes, as far as the umask allows.
  unreadable = [path for path in workdir.rglob("*") if path.is_file() and not path.stat().st_mode & 0o044]
  assert not unreadable
