"""What is installed is pinned: packages by hash, actions by commit; the files of requirements/ are complete."""

import configparser
import importlib.metadata
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest
import yaml

from tests.helpers.documents import ROOT

FOLDER = ROOT / "requirements"
# File -> extras of setup.cfg that it covers, besides the requirements of the package.
EXTRAS = {
  "quickstart": [],
  "serve": ["serve", "onnx"],
  "serve-cuda": ["serve", "cuda"],
  "train-tpu": ["tpu", "scann"],
  "train-cuda": ["cuda", "scann"],
}
ALONE = ["build", "minilm", "uv"]  # Files with packages that setup.cfg does not name.


def _pins(name, *, here=False):
  """Package -> version and hashes of a file of requirements/; `here` leaves out what other systems need."""
  text = re.sub(r"\\\n", " ", (FOLDER / f"{name}.txt").read_text())
  lines = [line.split("#")[0].strip() for line in text.splitlines()]
  found = {}
  for line in filter(None, lines):
    pin, *hashes = re.split(r"\s+--hash=", line)
    requirement = Requirement(pin)
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and requirement.url is None, line
    if not here or requirement.marker is None or requirement.marker.evaluate():
      found[canonicalize_name(requirement.name)] = specifier.version, hashes
  return found


def _setup(*extras):
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  lines = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in extras)]
  return [Requirement(line) for text in lines for line in text.split("\n") if line]


def test_each_file_is_tested():
  assert {path.stem for path in FOLDER.iterdir()} == {*EXTRAS, *ALONE}


@pytest.mark.parametrize("name", [*EXTRAS, *ALONE])
def test_every_package_has_hashes_and_the_version_of_the_constraints(name):
  lines = (ROOT / "constraints.txt").read_text().splitlines()
  versions = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
  pins = _pins(name)
  assert pins
  for package, (version, hashes) in pins.items():
    assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), package
    assert version == versions.get(package, version), f"{package}: run make lock"
  text = (FOLDER / f"{name}.txt").read_text()
  assert "://" not in text and "index-url" not in text and "# " in text and "make lock" in text


@pytest.mark.parametrize("name", EXTRAS)
def test_a_file_contains_what_setup_cfg_asks_for(name):
  pins = _pins(name)
  for requirement in _setup(*EXTRAS[name]):
    package = canonicalize_name(requirement.name)
    assert package in pins, f"{package}: run make lock"
    assert requirement.specifier.contains(pins[package][0]), f"{package}: run make lock"


@pytest.mark.parametrize("name", ["quickstart", "serve"])
def test_a_file_contains_what_its_packages_ask_for(name):
  pins = _pins(name, here=True)
  missing = {
    (package, requirement.name)
    for package in pins
    for requirement in map(Requirement, importlib.metadata.requires(package) or [])
    if (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    and canonicalize_name(requirement.name) not in pins
  }
  assert not missing


def _steps():
  for path in sorted((ROOT / ".github/workflows").iterdir()):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
      yield from job["steps"]


def test_actions_are_pinned_by_commit_with_the_version_beside_it():
  lines = [
    line.partition("uses: ")[2]
    for path in (ROOT / ".github/workflows").iterdir()
    for line in path.read_text().splitlines()
    if "uses: " in line
  ]
  assert lines
  for line in lines:
    assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line
  # A commit has one version, everywhere.
  assert len({line.split("  # ")[0] for line in lines}) == len({line.split("@")[0] for line in lines})


def test_no_step_adds_an_index_for_all_packages():
  steps = list(_steps())
  assert not [step for step in steps if "EXTRA_INDEX" in str(step)]
  assert [step for step in steps if step.get("run") == "make audit"]
