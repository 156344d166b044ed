"""The commands on a workdir in a bucket, each with an empty cache: a training that is killed, and what follows it."""

import json
import re
import subprocess
import sys
import time

import fsspec
import pytest

from tests.helpers.miniature_runs import miniature_config
from tests.helpers.s3_server import s3_server
from tests.helpers.training_checks import assert_same_bits, command, final_state
from vixml_jax.experiment import train_and_evaluate


@pytest.fixture(params=["file", "s3"])
def bucket(request, tmp_path):
  """URL of a bucket, its file system, the path in it, and the environment of commands."""
  if request.param == "file":
    yield f"file://{tmp_path}/bucket", fsspec.filesystem("file"), f"{tmp_path}/bucket", {}
    return
  with s3_server() as (files, environment):
    yield "s3://bucket", files, "bucket", environment


@pytest.mark.slow
def test_a_killed_training_continues_elsewhere_and_is_evaluated_and_changed_there(bucket, tmp_path):
  url, files, root, environment = bucket
  config = miniature_config(tmp_path / "place")
  config.train.epochs, config.checkpoint.every_steps = 20, 2
  config.eval.update(dict(blend=False, baselines=(), retrieval_augmented=False, retrieval_choose=False))
  train_and_evaluate(config, tmp_path / "local")
  in_bucket = config.copy_and_resolve_references()
  in_bucket.dataset.data_dir = f"{url}/data"
  (tmp_path / "new.jsonl").write_text('{"uid": "otter", "title": "horse fish"}\n')
  (tmp_path / "q.jsonl").write_text('{"title": "horse fish"}\n')
  caches = iter(range(100))

  def start(module, *flags):
    cache = {"XDG_CACHE_HOME": str(tmp_path / f"cache-{next(caches)}")}  # As another machine has it.
    started = command(in_bucket, f"{url}/run")
    if module != "main":
      started["args"] = [sys.executable, "-m", f"vixml_jax.{module}", f"--workdir={url}/run", *flags]
    return subprocess.Popen(**started | {"env": started["env"] | environment | cache})

  def output(process):
    text = process.communicate()[0]
    assert process.returncode == 0, text
    return text

  process = start("main")
  while not files.exists(f"{root}/run/checkpoints/4/sha256.json"):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.05)
  process.kill()
  process.communicate()
  text = output(start("main"))
  assert "was in use by process" in text
  assert int(re.search(r"resuming at step (\d+) of", text)[1]) >= 2
  files.get(f"{root}/run/", str(tmp_path / "copy"), recursive=True)
  assert_same_bits(final_state(config, tmp_path / "local"), final_state(config, tmp_path / "copy"))
  metrics = [json.loads((tmp_path / run / "final_metrics.json").read_text())["P@1"] for run in ("local", "copy")]
  assert metrics[0] == metrics[1]

  output(start("evaluate", "--search=exact"))
  output(start("evaluate", "--verify"))
  assert "1 added" in output(start("add_labels", f"--labels={tmp_path / 'new.jsonl'}"))
  output(start("predict", f"--queries={tmp_path / 'q.jsonl'}", f"--output={tmp_path / 'top.jsonl'}", "--k=1"))
  (found,) = json.loads((tmp_path / "top.jsonl").read_text())["predictions"]
  assert found["label"] == "otter"
  assert json.loads(files.cat(f"{root}/run/used_by.json"))["ended"]
