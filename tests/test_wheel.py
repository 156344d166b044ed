"""The wheel contains the package, its data and the configs, and runs where there is no checkout."""

from pathlib import Path
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.helpers.documents import ROOT
import vixml_jax


def _run(*command, cwd):
  return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A copy of what the wheel is built from, because building leaves folders behind."""
  folder = tmp_path_factory.mktemp("source")
  for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder)
  for name in ("vixml_jax", "configs"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp("wheel")
  options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
  result = _run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, ".", cwd=source)
  assert result.returncode == 0, result.stderr
  (path,) = folder.glob(f"vixml_jax-{vixml_jax.__version__}-*.whl")
  return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """The folder of the programs of an environment with the wheel, which finds its dependencies in that of the tests."""
  folder = tmp_path_factory.mktemp("environment")
  venv.create(folder, symlinks=True)
  options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
  result = _run(
    sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", *options, wheel, cwd=folder
  )
  assert result.returncode == 0, result.stderr
  (packages,) = folder.glob("lib/python*/site-packages")
  # A path in a .pth file is searched after the packages of the environment, and the .pth files in it are not run, so
  # that the editable installation of the tests is not found.
  (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return folder / "bin"


def test_wheel_contains_the_package_its_data_and_the_configs_and_nothing_else(source, wheel):
  shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  expected = {path.relative_to(source).as_posix() for path in (source / "vixml_jax").rglob("*") if path.is_file()}
  configs = {f"vixml_jax/configs/{path.name}" for path in (source / "configs").glob("*.py")}
  assert shipped == expected | configs
  assert {"vixml_jax/py.typed", "vixml_jax/configs/common.py"} <= shipped
  embedded = {Path(name).name for name in shipped if "mm_icons_9k/" in name}
  assert {"trn.json.gz", "tst.json.gz", "lbl.json.gz"} <= embedded


_LOAD = """
import importlib.util, pathlib, vixml_jax
from vixml_jax.run import named_configs
package = pathlib.Path(vixml_jax.__file__).parent
assert named_configs.configs_folder() == package / "configs", package
for name in named_configs.config_names():
  named_configs.load(name)
print(named_configs.load("quickstart:images=3", **{"train.epochs": 7}).train.epochs)
assert importlib.util.find_spec("configs") is None, "a package with this name would collide with those of others"
"""


def test_installed_wheel_loads_its_configs_by_name(installed, tmp_path):
  result = _run(installed / "python", "-c", _LOAD, cwd=tmp_path)
  assert (result.returncode, result.stdout) == (0, "7\n"), result.stderr


@pytest.mark.parametrize(
  ("arguments", "starts"),
  [(["--version"], f"vixml {vixml_jax.__version__}"), (["train", "--config=quickstart", "--help"], "Trains a model")],
)
def test_installed_wheel_has_the_command(installed, tmp_path, arguments, starts):
  result = _run(installed / "vixml", *arguments, cwd=tmp_path)
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.startswith(starts)


def test_installed_wheel_describes_a_config_in_an_empty_folder(installed, tmp_path):
  result = _run(installed / "vixml", "describe", "--config=quickstart:images=3", "--devices=1", cwd=tmp_path)
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.startswith("quickstart-images3: bert encoder, method prime, 24,880,768 parameters")
  assert not [*tmp_path.iterdir()]
