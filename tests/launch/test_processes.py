"""The commands that launchers print run in two processes on this machine, and give what one process gives."""

import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys

import pytest

from tests.launch.machine import LAUNCH, ROOT, WHERE, commands_of, option

QUERIES = 1000
_KEPT = ("JAX", "XLA", "HF_", "TOKENIZERS", "OMP")
# Starts two processes as srun does. With FAKE/stop, SIGTERM goes to the second one when a block is finished.
SRUN = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
for number in 0 1; do
  SLURM_PROCID=$number SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost "$@" &
  worker=$!
done
if [[ -e $FAKE/stop ]]; then
  rm "$FAKE/stop"
  until compgen -G "$FAKE/*.partial/*/done/*" > /dev/null; do kill -0 "$worker" || break; sleep 0.02; done
  kill -TERM "$worker"
fi
status=0
for worker in $(jobs -p); do wait "$worker" || status=$?; done
exit "$status"
"""


def _environment(machine):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  own = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
  # Two processes have as many devices as the one that trained.
  own["XLA_FLAGS"] = own["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  path = f"{machine.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
  return own | machine.env | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_PORT": port}


@pytest.fixture
def queries(machine) -> Path:
  path = machine.folder / "q.jsonl"
  path.write_text("".join(json.dumps({"title": f"arrow {number} cloud"}) + "\n" for number in range(QUERIES)))
  return path


def _of_one_process(machine, run: Path, queries: Path, *flags: str) -> bytes:
  output = machine.folder / "one.csv"
  command = [
    sys.executable,
    "-m",
    "vixml_jax.predict",
    f"--workdir={run}",
    f"--queries={queries}",
    f"--output={output}",
  ]
  subprocess.run([*command, *flags], cwd=ROOT, env=_environment(machine), check=True, capture_output=True, timeout=300)
  return output.read_bytes()


@pytest.mark.slow
def test_a_job_that_is_preempted_keeps_its_blocks_and_writes_what_one_process_writes(machine, texts_only, queries):
  flags = ["--batch_size=1", "--k=3"]
  output = machine.folder / "top.csv"
  (machine.bin / "srun").write_text(SRUN)
  launch = ["--command=predict", "--time=1:00", f"--workdir={texts_only.workdir}", f"--python={sys.executable}"]
  arguments = [f"--queries={queries}", f"--output={output}", *flags]
  result = machine.run("slurm.sh", *launch, "--", *arguments)
  assert result.returncode == 0, result.stderr
  (sbatch,) = machine.calls()
  script = sbatch[sbatch.index(str(LAUNCH / "slurm.sbatch")) :]
  (machine.folder / "stop").touch()

  def start(restarts):
    env = _environment(machine) | {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": restarts}
    return subprocess.run(["bash", *script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)

  stopped = start("0")
  assert stopped.returncode == 0 and "requeueing (1 of 20)" in stopped.stdout, stopped.stdout + stopped.stderr
  assert machine.calls()[-1] == ["scontrol", "requeue", "12"]
  assert not output.exists()
  kept = len(list(machine.folder.glob("top.csv.partial/*/done/*")))
  assert 0 < kept < QUERIES
  finished = start("1")
  assert finished.returncode == 0 and "finished: " in finished.stdout, finished.stdout + finished.stderr
  states = (machine.folder / "top.csv.logs/state/12-1").iterdir()
  assert {path.name: path.read_text() for path in states} == {"worker-0": "finished\n", "worker-1": "finished\n"}
  statistics = json.loads((machine.folder / "top.csv.stats.json").read_text())
  assert statistics["processes"] == 2 and 0 < statistics["queries_of_earlier_runs"] <= kept
  assert output.read_bytes() == _of_one_process(machine, texts_only.workdir, queries, *flags)


def _start_workload(machine, command, *arguments):
  """Runs on this machine what the nodes with GPUs of a workload run, with a folder as the bucket."""
  submit = ["gke_xpk.sh", "submit", *WHERE, "--cluster=c", "--name=w", "--bucket=b", "--image=i", "--type=h100-80gb-8"]
  flags = ["--num_slices=2", "--run=job", f"--command={command}", "--dry-run", "--", *arguments]
  shell = option(commands_of(machine.run(*submit, *flags))[-1], "command")
  env = _environment(machine)
  shell = shell.replace("w-slice-job-0-0.w:8476", f"localhost:{env['JAX_COORDINATOR_PORT']}")
  started = []
  for number in ("0", "1"):
    own = shell.replace("/tmp/vixml", f"{machine.folder}/node-{number}")
    process = subprocess.Popen(
      ["bash", "-c", own.replace("=/bucket", f"={machine.folder}/mounted")],
      cwd=ROOT,
      env=env | {"JOB_COMPLETION_INDEX": number},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    started.append(process)
  said = [process.communicate(timeout=400)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0], "\n".join(said)


@pytest.mark.slow
def test_a_workload_predicts_and_evaluates_with_two_nodes(machine, texts_only, queries):
  bucket = machine.folder / "mounted"
  shutil.copytree(texts_only.workdir, bucket / "runs/job")
  shutil.copy(queries, bucket / "q.jsonl")
  places = ["--workdir=gs://b/runs/job", "--queries=gs://b/q.jsonl", "--output=gs://b/answers/top.csv"]
  _start_workload(machine, "predict", *places, "--batch_size=16")
  wanted = _of_one_process(machine, texts_only.workdir, queries, "--batch_size=16")
  assert (bucket / "answers/top.csv").read_bytes() == wanted
  assert {path.name for path in (bucket / "jobs/job/logs").iterdir()} == {"worker-0.log", "worker-1.log"}
  assert [path.read_text() for path in (bucket / "jobs/job/state").iterdir()] == ["finished\n"] * 2
  assert not (bucket / "jobs/job/checkpoints").exists()
  # Evaluation finds the data set and the encoder under other names than training did.
  for name in ("data", "encoder"):
    shutil.copytree(texts_only.folder / "gone" / name, bucket / name)
  config = json.loads((bucket / "runs/job/config.json").read_text())
  config["encoder"]["pretrained"], config["dataset"]["raw_dir"] = str(bucket / "encoder"), ""
  (bucket / "runs/job/config.json").write_text(json.dumps(config))
  metrics = json.loads((bucket / "runs/job/final_metrics.json").read_text())
  (bucket / "runs/job/final_metrics.json").unlink()
  _start_workload(machine, "evaluate")
  assert json.loads((bucket / "runs/job/final_metrics.json").read_text()).keys() == metrics.keys()
  assert [path.read_text() for path in (bucket / "runs/job/state").iterdir()] == ["finished\n"] * 2
