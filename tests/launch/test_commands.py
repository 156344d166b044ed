"""Launchers start predict, encode, features and evaluate as they start training, and continue them when preempted."""

from pathlib import Path
import shlex
import subprocess
import sys

import pytest

from tests.helpers.miniature_runs import load_config
from tests.launch.machine import CONFIG, FIELDS, LAUNCH, POD, ROOT, WHERE, commands_of, option
from vixml_jax.run import configuration

PREDICT = [
  "--workdir=gs://b/runs/first",
  "--queries=gs://b/my q.jsonl",
  "--output=gs://b/answers/it's.parquet",
  "--k=5",
]
ENCODE = ["--workdir=gs://b/runs/first", "--queries=gs://b/q.csv", "--output=gs://b/vectors", "--dtype=float16"]
FEATURES = [CONFIG, FIELDS, "--checkpoint=gs://b/weights/tower.npz", "--name=mine"]
EVALUATE = ["--search=exact"]
FLAGS = {"predict": PREDICT, "encode": ENCODE, "features": FEATURES, "evaluate": EVALUATE}
MODULES = {"predict": "predict", "encode": "encode", "features": "extract_features", "evaluate": "evaluate"}
"""Command of the launchers -> flags of a case, and the module that it starts."""

RUN = ["tpu_pod.sh", "run", *POD, "--type=v5litepod-16", "--poll_seconds=0"]
SUBMIT = ["gke_xpk.sh", "submit", *WHERE, "--cluster=c", "--name=w", "--bucket=b", "--image=i", "--type=v5litepod-16"]
SLURM = ["slurm.sh", "--time=1:00", "--nodes=2", "--gpus_per_node=1"]


def _launch(machine, start, command, *flags, arguments=None):
  script, *words = start
  return machine.run(script, *words, f"--command={command}", *flags, "--", *(arguments or FLAGS[command]))


def _on_pod(words, bucket):
  """The flags of a case as the workers get them, with their mount of the bucket."""
  return [word.replace("=gs://b/", f"={bucket}/") for word in words]


# What is wrong is said before anything is asked or bought.

NEEDS = ["--workdir=gs://b/r", "--queries=gs://b/q.csv", "--output=gs://b/o.csv"]
REFUSED = {
  "one process": ("serve", [], "--command=serve: must be train, evaluate, predict, encode or features"),
  "prepare": ("prepare", [], "--command=prepare: must be train"),
  "no workdir": ("predict", NEEDS[1:], "--workdir: must be given after --"),
  "no queries": ("predict", NEEDS[::2], "--queries: must be given after --"),
  "no output": ("encode", NEEDS[:2], "--output: must be given after --"),
  "suffix of queries": (
    "encode",
    [NEEDS[0], "--queries=gs://b/q.txt", NEEDS[2]],
    "must end in .jsonl, .csv or .parquet",
  ),
  "suffix of output": ("predict", [*NEEDS[:2], "--output=gs://b/o"], "--output=gs://b/o: must end in .jsonl"),
  "local workdir": ("predict", ["--workdir=runs/x", *NEEDS[1:]], "--workdir=runs/x: must be in the bucket, as gs://b/"),
  "another bucket": ("predict", [*NEEDS[:2], "--output=gs://c/o.csv"], "--output=gs://c/o.csv: must be in the bucket"),
  "pattern": ("encode", [NEEDS[0], "--queries=gs://b/*.csv", NEEDS[2]], "must not contain *, ?, [ or ]"),
  "local tower": ("predict", [*NEEDS, "--image_checkpoint=/x.npz"], "copy it to the bucket, and give it as --image"),
  "tower elsewhere": ("predict", [*NEEDS, "--image_checkpoint=gs://c/x.npz"], "must be in the bucket that the workers"),
  "number of process": ("predict", [*NEEDS, "--process=1"], "--process: is set by the launcher; leave it out"),
  "distributed": ("encode", [*NEEDS, "--distributed"], "--distributed: is set by the launcher"),
  "stray word": ("predict", [*NEEDS, "k=3"], "'k=3': is not a flag of predict"),
  "launcher's flag": (
    "predict",
    [*NEEDS, "--dry-run"],
    "--dry-run: is a flag of {script}, not of predict; put it before",
  ),
  "no config": ("features", ["--checkpoint=x"], "--config: must be given after --"),
  "no checkpoint": ("features", [CONFIG], "--checkpoint: must be given after --"),
  "published": (
    "features",
    [CONFIG, "--published=d"],
    "--published: runs in one process; run vixml features --published",
  ),
  "data of features": ("features", [*FEATURES, "--config.dataset.data_dir=d"], "data_dir: is set by the launcher"),
  "name of a run": ("features", [*FEATURES, "--run=x"], "--run: is a flag of {script}, not of features"),
  "workdir of evaluate": ("evaluate", ["--workdir=gs://b/runs/x"], "--workdir: is set by the launcher"),
  "comparison": ("evaluate", ["--compare=a,b"], "--compare: runs in one process; run vixml evaluate --compare on one"),
}


@pytest.mark.parametrize("start", [RUN, SUBMIT], ids=["pod", "GKE"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line_before_anything_is_asked(case, start, machine):
  command, arguments, message = REFUSED[case]
  result = _launch(machine, start, command, arguments=arguments or ["--k=1"])
  assert result.returncode == 1 and not result.stdout
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ") and message.format(script=start[0]) in line
  assert machine.calls() == []


def test_a_flag_that_the_command_does_not_have_is_found_on_this_machine(machine):
  result = _launch(machine, RUN, "predict", f"--python={sys.executable}", arguments=[*NEEDS, "--rankng=blend"])
  assert result.returncode == 1 and machine.calls() == []
  assert result.stderr == "error: Unknown command line flag 'rankng'. Did you mean: ranking ?\n"


# Checks.


def _checks(result):
  assert result.returncode == 0, result.stderr
  return [line.partition(" ")[2] for line in result.stderr.splitlines()]


def test_check_of_predict_looks_for_the_run_and_the_queries_and_wants_no_data(machine):
  machine.answer("cat", '{"stored": 1}')
  machine.answer("ls", "gs://b/found", "gs://b/found", "gs://b/found", "gs://b/found", "!1")
  check = ["tpu_pod.sh", "check", *RUN[2:]]
  told = _checks(_launch(machine, check, "predict", "--max_hours=2", "--price_per_chip_hour=1"))
  assert told[-5:] == [
    "check: config: data set lf, image features siglip, encoder Qwen/Qwen2.5-3B",
    "check: run: gs://b/runs/first",
    "check: queries: gs://b/my q.jsonl",
    "check: output: gs://b/answers/it's.parquet",
    "cost: 16 chips, at most 32 chip-hours, 16.00 an hour, at most 32.00 in total",
  ]
  asked = [call[-1] for call in machine.calls() if call[:3] == ["gcloud", "storage", "ls"]]
  assert asked == [
    *(f"gs://b/runs/first/{name}" for name in ("checkpoints/", "inference.json", "index/CURRENT")),
    *(word.partition("=")[2] for word in PREDICT[1:3]),
  ]


FOUND = "gs://b/found"
FAILING = {
  "run": (
    "predict",
    "cat",
    ["!1 ERROR: no such object"],
    "gs://b/runs/first: has no config.json; it must be the workdir",
  ),
  "index": ("predict", "ls", [FOUND, FOUND, "!1"], "gs://b/runs/first: has no index/CURRENT; vixml evaluate writes it"),
  "queries": ("predict", "ls", [FOUND, FOUND, FOUND, "!1"], "--queries=gs://b/my q.jsonl: no such file or folder"),
  "items": ("encode", "ls", [FOUND, FOUND, "!1"], "--queries=gs://b/q.csv: no such file or folder"),
  "frozen encoder": (
    "predict",
    "ls",
    [FOUND, FOUND, FOUND, "!1"],
    "--weights: must be given, because the run reads its",
  ),
  "checkpoints": ("evaluate", "ls", ["!1"], "gs://b/runs/pod: has no checkpoints/"),
  "data": ("evaluate", "ls", [FOUND, "!1"], "--data_dir: must be given, because gs://b/data has no lf"),
  "data of features": ("features", "ls", ["!1"], "--data_dir: must be given, because gs://b/data has no lf"),
  "tower": ("features", "ls", [FOUND, "!1"], "--checkpoint=gs://b/weights/tower.npz: no such file or folder"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_check_is_one_line_and_nothing_is_created(case, machine):
  command, what, answers, message = FAILING[case]
  machine.answer("cat", "{}")
  if case == "frozen encoder":
    machine.answer("config", "dataset=lf", "embedded=false", "pretrained=/u/vixml/weights/qwen", "frozen=true")
  machine.answer(what, *answers)
  result = _launch(machine, RUN, command)
  assert result.returncode == 1
  (line,) = (line for line in result.stderr.splitlines() if " check: " not in line)
  assert line.startswith("error: ") and message in line
  assert not [call for call in machine.calls() if {"create", "cp", "rsync", "ssh"} & set(call)]


def test_a_workload_must_name_the_frozen_encoder_that_its_workers_copy(machine):
  machine.answer("cat", "{}")
  machine.answer("config", "dataset=lf", "pretrained=/tmp/vixml/weights/qwen", "frozen=true")
  result = _launch(machine, SUBMIT, "predict")
  assert result.returncode == 1 and "--weights: must be --weights=qwen, because every worker reads" in result.stderr
  result = _launch(machine, SUBMIT, "predict", "--weights=/w/qwen")
  assert result.returncode == 0, result.stderr
  words = shlex.split(option(machine.calls()[-1], "command"))
  assert "--copy=/bucket/weights/qwen:/tmp/vixml/weights/qwen" in words
  assert not [word for word in words if word.startswith("--config.")]


def test_an_output_that_exists_is_a_warning(machine):
  machine.answer("cat", "{}")
  told = _checks(_launch(machine, ["tpu_pod.sh", "check", *RUN[2:]], "encode"))
  assert told[-2].startswith("warning: gs://b/vectors exists; if it is the result of another command, predict replaces")


@pytest.mark.parametrize(("text", "error"), [(None, None), ("{}", "config.json of the run: "), ("", None)])
def test_the_reader_reads_the_config_of_a_run(text, error, tmp_path):
  if text is None:
    configuration.write(load_config("lf_amazon_1.3m", "encoder=qwen2.5-3b,images=3"), tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
  command = [sys.executable, LAUNCH / "read_config.py", "predict", *PREDICT]
  result = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=120)
  if error:
    assert result.returncode == 1 and result.stderr.startswith(f"error: {error}"), result.stderr
    return
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert lines == [] or {"dataset=lf_amazon_titles_1_3m", "frozen=true"} <= set(lines)
  assert bool(lines) == bool(text)


# What is started.


@pytest.mark.parametrize("command", FLAGS)
def test_a_dry_run_prints_the_checks_and_all_commands_and_runs_none(command, machine):
  result = _launch(machine, RUN, command, "--dry-run", "--delete")
  kinds = ["auth", "projects", "buckets", "quotas", "archive", "create", "describe", "ssh", "rm", "delete"]
  printed = [next((kind for kind in kinds if kind in line), None) for line in commands_of(result)]
  assert [kind for kind in printed if kind] == [
    *kinds[:4],
    *("archive", "create", "describe", "ssh", "rm", "ssh", "describe", "delete", "create", "delete"),
  ]
  assert machine.calls() == []


@pytest.mark.parametrize("command", FLAGS)
def test_a_pod_starts_the_command_with_what_its_workers_mount(command, machine):
  (machine.bin / "sudo").write_text('#!/usr/bin/env bash\nexec "$@"\n')
  flags = ["--run=job", "--weights=/w/qwen", "--max_hours=1"]
  start = ["tpu_pod.sh", "train", *POD]
  removed, ssh = commands_of(_launch(machine, start, command, *flags, "--dry-run"))
  runs = "runs" if command == "evaluate" else "jobs"
  assert removed == ["gcloud", "storage", "rm", "--quiet", f"gs://b/{runs}/job/state/*"]
  # What ssh runs on a worker is parsed by a shell once more.
  words = shlex.split(option(ssh, "command"))
  assert words[:2] == ["bash", "vixml/code/launch/tpu_worker.sh"]
  home = machine.folder / "vixml"
  (home / "raw").mkdir(parents=True)
  machine.answer("curl", "1")
  assert machine.run("tpu_worker.sh", *words[2:]).returncode == 0
  service = machine.calls()[-1]
  worker = service[service.index("bash") :]
  assert worker.pop(worker.index(next(word for word in worker if word.startswith("--deadline="))))
  make = {"predict": [f"--make={home}/bucket/answers"]}.get(command, [])
  data = {
    "features": [f"--config.dataset.data_dir={home}/bucket/data", f"--config.dataset.raw_dir={home}/raw"],
    "evaluate": [f"--data_dir={home}/data"],
  }
  assert worker == [
    "bash",
    f"{home}/code/launch/train_worker.sh",
    f"{'--workdir' if command == 'evaluate' else '--job'}={home}/{runs}/job",
    f"--store={home}/bucket/{runs}/job",
    "--name=worker-1",
    *make,
    "--",
    f"{home}/venv/bin/python",
    "-m",
    f"vixml_jax.{MODULES[command]}",
    *_on_pod(FLAGS[command], "~/vixml/bucket"),
    *data.get(command, []),
    "--distributed",
  ]


@pytest.mark.parametrize(("command", "copied"), [("predict", "b weights"), ("features", "b raw"), ("evaluate", "b")])
def test_setup_copies_what_the_command_needs(command, copied, machine):
  setup = commands_of(machine.run("tpu_pod.sh", "setup", *POD, f"--command={command}", "--dry-run"))[0]
  assert option(setup, "command").endswith(f"tpu_worker.sh setup {copied}")


def test_run_stages_no_data_for_predict_and_continues_after_a_preemption(machine):
  (machine.folder / "data/lf").mkdir(parents=True)
  machine.answer("describe", "!1", "ACTIVE", "ACTIVE", "SUSPENDING", "ACTIVE")
  machine.answer("cat", "{}", "running;running", "running;running", "finished;finished")
  result = _launch(machine, RUN, "predict", f"--data_dir={machine.folder}/data", "--delete")
  assert result.returncode == 0, result.stderr
  assert result.stderr.splitlines()[-1].endswith("finished; its results are in gs://b/answers/it's.parquet")
  assert not [call for call in machine.calls() if "rsync" in call]
  starts = [call for call in machine.calls() if "ssh" in call and "start" in option(call, "command")]
  assert len(starts) == 2 and starts[0] == starts[1]
  assert machine.calls()[-1][3:5] == ["queued-resources", "delete"]


@pytest.mark.parametrize("command", FLAGS)
def test_a_workload_starts_the_command_with_what_its_workers_mount(command, machine):
  flags = ["--run=job", "--raw_dir=/raw"]
  *checks, submit = commands_of(_launch(machine, SUBMIT, command, *flags, "--dry-run"))
  assert all(check[0] == "gcloud" for check in checks)
  runs = "runs" if command == "evaluate" else "jobs"
  raw = ["--copy=/bucket/raw:/tmp/vixml/raw"]
  copies = {"predict": ["--make=/bucket/answers"], "encode": [], "features": raw}
  data = {
    "features": ["--config.dataset.data_dir=/bucket/data", "--config.dataset.raw_dir=/tmp/vixml/raw"],
    "evaluate": ["--data_dir=/tmp/vixml/data"],
  }
  assert shlex.split(option(submit, "command")) == [
    "exec",
    "bash",
    "launch/train_worker.sh",
    f"{'--workdir' if command == 'evaluate' else '--job'}=/tmp/vixml/{runs}/job",
    f"--store=/bucket/{runs}/job",
    *copies.get(command, ["--copy=/bucket/data:/tmp/vixml/data", *raw]),
    "--",
    "python",
    "-m",
    f"vixml_jax.{MODULES[command]}",
    *_on_pod(FLAGS[command], "/bucket"),
    *data.get(command, []),
    "--distributed",
  ]
  machine.answer("cat", "{}")
  assert _launch(machine, SUBMIT, command, *flags).returncode == 0
  assert machine.calls()[-1] == submit


# SLURM.


@pytest.fixture
def trained(machine) -> Path:
  """A folder that has the files of a trained workdir, and a file of queries beside it."""
  run = machine.folder / "run"
  (run / "index").mkdir(parents=True)
  for name in ("config.json", "index/CURRENT", "../q.csv"):
    (run / name).write_text("{}\n")
  return run


def _arguments(machine, command):
  places = [f"--queries={machine.folder}/q.csv", f"--output={machine.folder}/top.csv"]
  return {"features": [CONFIG, "--checkpoint=hub/tower"], "evaluate": ["--search=exact"]}.get(command, places)


@pytest.mark.parametrize("command", FLAGS)
def test_a_job_starts_the_command_on_all_processes(command, machine, trained):
  folder, arguments = machine.folder, _arguments(machine, command)
  flags = {"features": [f"--data_dir={folder}"], "evaluate": [f"--workdir={trained}", "--data_dir=/d"]}
  result = _launch(machine, SLURM, command, *flags.get(command, [f"--workdir={trained}"]), arguments=arguments)
  assert result.returncode == 0, result.stderr
  (sbatch,) = machine.calls()
  logs = {"features": folder / "features.logs", "evaluate": trained}.get(command, folder / "top.csv.logs")
  assert f"--output={logs}/slurm-%j.log" in sbatch and logs.is_dir()
  words = sbatch[sbatch.index(str(LAUNCH / "slurm.sbatch")) + 1 :]
  data = {"features": [f"--config.dataset.data_dir={folder}"], "evaluate": ["--data_dir=/d"]}
  given = [*arguments, *data.get(command, [f"--workdir={trained}"])]
  assert words[1:] == [str(logs), "20", "", MODULES[command], *given]
  assert machine.run("slurm.sbatch", *words, SLURM_JOB_ID="12").returncode == 0
  *prepare, step = machine.calls()[1:]
  assert [call[5:] for call in prepare] == (
    [["-m", "vixml_jax.prepare_data", CONFIG, data[command][0]]] if command == "features" else []
  )
  place = "--workdir" if command == "evaluate" else "--job"
  assert step[step.index("launch/train_worker.sh") + 1 :] == [
    f"{place}={logs}",
    f"--state={logs}/state/12-0",
    *("--", words[0], "-m", f"vixml_jax.{MODULES[command]}", *given, "--distributed"),
  ]


MISSING = {
  "run": ("predict", "run/config.json", "--workdir={0}/run: has no config.json"),
  "index": ("predict", "run/index/CURRENT", "--workdir={0}/run: has no label index"),
  "queries": ("encode", "q.csv", "--queries={0}/q.csv: no such file"),
  "stored config": ("evaluate", "run/config.json", "--workdir={0}/run: has no config.json"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_job_whose_files_are_missing_is_not_submitted(case, machine, trained):
  command, name, message = MISSING[case]
  (machine.folder / name).unlink()
  result = _launch(machine, SLURM, command, f"--workdir={trained}", arguments=_arguments(machine, command))
  assert result.returncode == 1 and machine.calls() == []
  assert result.stderr.startswith(f"error: {message.format(machine.folder)}")


def test_an_output_without_a_folder_is_refused_before_a_job_is_submitted(machine, trained):
  arguments = [f"--queries={machine.folder}/q.csv", "--output=/no/such/top.csv"]
  result = _launch(machine, SLURM, "predict", f"--workdir={trained}", arguments=arguments)
  assert result.returncode == 1 and machine.calls() == []
  assert result.stderr == "error: --output=/no/such/top.csv: its folder does not exist or cannot be written to\n"
