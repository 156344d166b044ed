"""stderr has the lines of this package, and JAX is told about absent TPUs before libtpu complains."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.helpers.documents import ROOT

# As `messages.set_up`, with a folder of device files instead of that of this machine.
_SET_UP = """
import os, pathlib, sys
from vixml_jax import messages
messages.Path = lambda folder: pathlib.Path(sys.argv[1])
messages.set_up()
print(os.environ.get("JAX_PLATFORMS"))
"""


@pytest.fixture
def set_up(tmp_path):
  """Returns a function of device files, installed packages and variables -> (JAX_PLATFORMS, lines on stderr)."""

  def run(devices=(), packages=(), **variables):
    for kind, names in {"dev": devices, "packages": packages}.items():
      (tmp_path / kind).mkdir(exist_ok=True)
      for name in names:
        (tmp_path / kind / name).parent.mkdir(exist_ok=True)
        (tmp_path / kind / name).touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX")}
    environment |= {"PYTHONPATH": f"{ROOT}:{tmp_path / 'packages'}"} | variables
    result = subprocess.run(
      [sys.executable, "-c", _SET_UP, tmp_path / "dev"], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip(), result.stderr.splitlines()

  return run


def test_the_cpu_is_used_where_libtpu_finds_no_tpu(set_up):
  platform, (line,) = set_up(packages=["libtpu.py"])
  assert platform == "cpu"
  assert line.endswith("no TPU is attached: using the CPU; JAX_PLATFORMS overrides this")


@pytest.mark.parametrize("device", ["accel0", "vfio/0", "nvidia0", "kfd"])
def test_an_attached_accelerator_is_left_to_jax(set_up, device):
  assert set_up(devices=[device], packages=["libtpu.py"]) == ("None", [])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_nothing_is_chosen_without_libtpu(set_up):
  assert set_up() == ("None", [])


def test_the_choice_of_the_user_stays(set_up):
  assert set_up(packages=["libtpu.py"], JAX_PLATFORMS="tpu") == ("tpu", [])
