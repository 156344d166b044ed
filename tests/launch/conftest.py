"""Gives tests of launchers a machine without the real programs."""

import pytest

from tests.launch.machine import Machine


@pytest.fixture
def machine(tmp_path):
  machine = Machine(tmp_path)
  # No test may reach the real programs.
  machine.replace(
    "git",
    "gcloud",
    "xpk",
    "kubectl",
    "docker",
    "sbatch",
    "srun",
    "scontrol",
    "sudo",
    "systemctl",
    "systemd-run",
    "curl",
    "mountpoint",
    "gcsfuse",
    "uv",
    "python3",
    "gpg",
  )
  machine.answer_all_checks()
  return machine
