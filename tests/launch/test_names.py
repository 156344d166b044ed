"""Names with spaces, quotes and what a shell would expand reach the programs as they were typed."""

import re
import shlex

import pytest

from tests.launch.machine import CONFIG, LAUNCH, POD, WHERE, commands_of, option

NAMES = [
  "a b",
  "it's",
  'say "x"',
  "$HOME",
  "`id`",
  "$(id)",
  "a;id",
  "a&b|c",
  "a\\b",
  "-rf",
  "#x",
  "~",
  "!x",
  "{a,b}",
  "a  b ",
]
GKE = [*WHERE, "--cluster=c", "--name=w", "--type=v6e-16", "--image=i", "--bucket=b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pod_gets_names_as_they_were_typed(name, machine):
  weights = machine.folder / "models" / name
  weights.mkdir(parents=True)
  training = ["--", CONFIG, f"--config.dataset.raw_dir={name}"]
  flags = [*POD, f"--weights={weights}"]
  assert machine.run("tpu_pod.sh", "stage", *flags).returncode == 0
  assert machine.calls()[-1][-2:] == [str(weights), f"gs://b/weights/{name}"]
  (command,) = (
    line for line in commands_of(machine.run("tpu_pod.sh", "train", "--dry-run", *flags, *training)) if "ssh" in line
  )
  # What ssh runs on a worker is parsed by a shell once more.
  words = shlex.split(option(command, "command"))
  assert words[:5] == ["bash", "vixml/code/launch/tpu_worker.sh", "start", "pod", f"--weights={name}"]
  assert words[5:] == training
  (machine.bin / "sudo").write_text('#!/usr/bin/env bash\nexec "$@"\n')
  assert machine.run("tpu_worker.sh", *words[2:]).returncode == 0
  service = machine.calls()[-1]
  assert service[0] == "systemd-run"
  assert f"--config.encoder.pretrained={machine.folder}/vixml/weights/{name}" in service
  assert f"--config.dataset.raw_dir={name}" in service


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_gets_names_as_they_were_typed(name, machine):
  training = ["--", CONFIG, f"--config.dataset.raw_dir={name}"]
  command = commands_of(machine.run("gke_xpk.sh", "submit", "--dry-run", *GKE, f"--weights=/models/{name}", *training))[
    -1
  ]
  words = shlex.split(option(command, "command"))
  assert f"--copy=/bucket/weights/{name}:/tmp/vixml/weights/{name}" in words
  assert f"--config.encoder.pretrained=/tmp/vixml/weights/{name}" in words
  assert f"--config.dataset.raw_dir={name}" in words


@pytest.mark.parametrize("name", NAMES)
def test_a_job_gets_names_as_they_were_typed(name, machine):
  workdir = machine.folder / name
  flags = ["--time=1:00", f"--workdir={workdir}", f"--data_dir=/data/{name}", f"--python=/{name}/python"]
  assert machine.run("slurm.sh", *flags, "--", CONFIG).returncode == 0
  (call,) = machine.calls()
  assert option(call, "output") == f"{workdir}/slurm-%j.log" and workdir.is_dir()
  script = call.index(str(LAUNCH / "slurm.sbatch"))
  assert call[script + 1 : script + 3] == [f"/{name}/python", str(workdir)]
  assert call[-1] == f"--config.dataset.data_dir=/data/{name}"
  machine.answer("srun", "")
  assert machine.run("slurm.sbatch", *call[script + 1 :], SLURM_JOB_ID="12").returncode == 0
  prepare, train = machine.calls()[1:]
  assert prepare[4:] == [f"/{name}/python", "-m", "vixml_jax.prepare_data", CONFIG, call[-1]]
  assert f"--workdir={workdir}" in train and call[-1] in train


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_writes_copies_and_publishes_under_such_names(name, machine):
  place = machine.folder / name
  source, workdir, store = place / "from", place / "run", place / "store"
  source.mkdir(parents=True)
  (source / name).write_text("data")
  script = 'mkdir -p "$1"; echo 1 > "$1/$2"; cat "$3/$2"; echo "${@: -1}"'
  words = ["run", str(workdir / name), name, str(place / "to")]
  result = machine.run(
    "train_worker.sh",
    f"--workdir={workdir}",
    f"--store={store}",
    f"--name=w {len(name)}",
    f"--copy={source}:{place / 'to'}",
    "--",
    "bash",
    "-c",
    script,
    *words,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"data--workdir={workdir}\n"
  assert (store / name / name).read_text() == "1\n"
  assert (store / "state" / f"w {len(name)}").read_text() == "finished\n"
  assert not list(machine.folder.glob("vixml*"))


@pytest.mark.parametrize(
  ("script", "flags"),
  [
    ("tpu_pod.sh", ["train", *POD, "--weights=/models/*", "--", CONFIG]),
    ("tpu_pod.sh", ["train", *POD, "--weights=a:b", "--", CONFIG]),
    ("gke_xpk.sh", ["submit", *GKE, "--weights=/models/a:b", "--", CONFIG]),
    ("gke_xpk.sh", ["submit", *GKE, "--weights=[ab]", "--", CONFIG]),
  ],
)
def test_names_that_an_address_cannot_have_are_refused(script, flags, machine):
  result = machine.run(script, *flags)
  assert (result.returncode, result.stdout) == (1, "")
  assert re.fullmatch(r"error: --weights=.*: its name must not contain \*, \?, :, \[ or \]\n", result.stderr)
  assert machine.calls() == []


def test_numbers_that_bash_would_read_as_octal_are_refused(machine):
  result = machine.run("tpu_pod.sh", "run", *POD, "--max_restarts=08")
  assert result.stderr == "error: --max_restarts=08: must be a whole number\n"
