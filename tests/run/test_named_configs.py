"""Configs are found by name or path, and config files import each other without an installed package `configs`."""

import sys

import pytest

import configs.common
import configs.encoders
import configs.quickstart
from tests.helpers.documents import ROOT
from vixml_jax.errors import InputError
from vixml_jax.run import named_configs


def test_names_are_the_files_that_define_a_config():
  files = {path.stem for path in (ROOT / "configs").glob("*.py")}
  assert set(named_configs.config_names()) == files - {"common", "encoders"}


@pytest.mark.parametrize("argument", ["quickstart", "quickstart:images=3", "configs/quickstart.py:images=3"])
def test_a_name_and_a_path_lead_to_the_same_file(argument, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert named_configs.config_path(argument).resolve() == ROOT / "configs" / "quickstart.py"


def test_load_returns_the_config_of_the_variant():
  assert named_configs.load("quickstart:full,images=3") == configs.quickstart.get_config("full,images=3").lock()


def test_overrides_set_values():
  config = named_configs.load("custom", **{"train.epochs": 7, "dataset.raw_dir": "elsewhere"})
  assert (config.train.epochs, config.dataset.raw_dir) == (7, "elsewhere")


@pytest.mark.parametrize(
  "argument,overrides,message",
  [
    ("quickstrat", {}, "there is no config 'quickstrat'; did you mean quickstart?.*custom.*lf_amazon_1.3m"),
    ("elsewhere/custom.py", {}, "there is no file elsewhere/custom.py; did you mean custom?"),
    ("custom:encoder=gpt", {}, "custom:encoder=gpt: encoder=gpt: must be one of"),
    ("custom", {"train.epoch": 1}, "config.train.epoch: there is no such key"),
    ("custom", {"trian.epochs": 1}, "config.trian.epochs: there is no such key"),
    ("custom", {"train.epochs": "many"}, "config.train.epochs='many'"),
  ],
)
def test_an_error_is_one_line(argument, overrides, message):
  with pytest.raises(InputError, match=message) as error:
    named_configs.load(argument, **overrides)
  assert "\n" not in str(error.value)


def test_a_broken_config_file_is_an_input_error(tmp_path):
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  with pytest.raises(InputError, match=r"broken.py"):
    named_configs.load(f"{tmp_path}/broken.py")


def test_a_config_of_the_user_imports_ours_and_its_neighbors(tmp_path):
  folder = tmp_path / "configs"
  folder.mkdir()
  (folder / "neighbor.py").write_text("EPOCHS = 5\n")
  (folder / "mine.py").write_text(
    "from configs import custom, neighbor\n"
    "def get_config():\n"
    "  from configs import encoders  # A late import works as well.\n"
    "  config = custom.get_config()\n"
    "  config.train.epochs = neighbor.EPOCHS + len(encoders.ENCODERS)\n"
    "  return config\n"
  )
  config = named_configs.load(str(folder / "mine.py"))
  assert config.train.epochs == 5 + len(configs.encoders.ENCODERS)


def test_loading_leaves_another_package_of_this_name_as_it_was():
  before = sys.modules["configs"], sys.modules["configs.common"]
  named_configs.load("custom")
  assert (sys.modules["configs"], sys.modules["configs.common"]) == before
  assert configs.common is before[1]
