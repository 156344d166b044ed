"""`.ci/images` builds every Dockerfile of launch/, and a workflow of GitHub runs it for each image."""

import os
import re
import subprocess

import pytest
import yaml

from tests.helpers.miniature_runs import ROOT

_DOCKER = """#!/bin/bash
echo "$*" >> "$DOCKER_LOG"
"""


def _run(tmp_path, *names, docker=_DOCKER):
  """Runs the script with a stand-in for docker; returns its result and the commands that docker got."""
  (tmp_path / "docker").write_text(docker)
  (tmp_path / "docker").chmod(0o700)
  log = tmp_path / "log"
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DOCKER_LOG": str(log)}
  result = subprocess.run(["bash", ROOT / ".ci/images", *names], env=environment, capture_output=True, text=True)
  return result, log.read_text().splitlines() if log.exists() else []


def test_all_dockerfiles_are_built_and_the_programs_of_each_image_are_started(tmp_path):
  result, commands = _run(tmp_path)
  assert result.returncode == 0, result.stderr
  builds = [command for command in commands if command.startswith("build ")]
  files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "launch").rglob("Dockerfile*")}
  assert {re.search(r"--file=(\S+)", build)[1] for build in builds} == {
    name for name in files if not name.endswith(".dockerignore")
  }
  tags = [re.search(r"--tag=(\S+)", build)[1] for build in builds]
  runs = [command for command in commands if command.startswith("run ")]
  assert len(runs) == len(set(tags)) == len(tags)
  for tag, run in zip(tags, runs, strict=True):
    assert f" {tag} -c import " in run and "--read-only" in run
  names = [line.partition(":")[0].removeprefix("vixml-") for line in result.stdout.splitlines()]
  jobs = yaml.safe_load((ROOT / ".github/workflows/images.yml").read_text())["jobs"]
  assert jobs["build"]["strategy"]["matrix"]["image"] == names
  assert jobs["build"]["steps"][-1]["run"] == "bash .ci/images ${{ matrix.image }}"


@pytest.mark.parametrize(
  ("names", "docker", "message"),
  [(("other",), _DOCKER, "'other': must be serve, serve-cuda"), ((), "exit 1", "docker does not run on this machine")],
)
def test_an_unknown_image_and_a_machine_without_docker_are_named(tmp_path, names, docker, message):
  result, _ = _run(tmp_path, *names, docker=f"#!/bin/bash\n{docker}")
  assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1


def test_modules_that_the_images_import_exist():
  for name in re.findall(r"vixml_jax(?:\.\w+)+", (ROOT / ".ci/images").read_text()):
    path = ROOT / name.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name
