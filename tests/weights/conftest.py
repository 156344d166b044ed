"""A folder of a BertModel for the tests of this room: written once a module, copied for each test that changes it."""

import copy
import shutil

import pytest
from safetensors.numpy import load_file

from tests.helpers import tiny_encoders


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A folder of a BertModel, and the shapes of our parameters."""
  folder = tmp_path_factory.mktemp("bert")
  tiny_encoders.hf_encoder("bert").save_pretrained(folder)
  return folder, tiny_encoders.our_shapes(folder)[1]


@pytest.fixture
def bert(written, tmp_path):
  """A copy of the folder that can be changed, its tensors, and a copy of the shapes."""
  folder, shapes = written
  shutil.copytree(folder, tmp_path / "bert")
  return tmp_path / "bert", load_file(folder / "model.safetensors"), copy.deepcopy(shapes)
