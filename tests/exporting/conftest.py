"""Encoders of tiny workdirs, which the tests of this folder share."""

import functools

import jax
import pytest

from tests.helpers.tiny_workdirs import tiny_config, write_workdir
from vixml_jax import sharding
from vixml_jax.inference.trained_encoder import load_trained_encoder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
  """Function that restores an encoder by name, from a workdir that the first call writes."""

  @functools.cache
  def encoder(name):
    folder = tmp_path_factory.mktemp("made")
    return load_trained_encoder(
      write_workdir(folder / "run", tiny_config(folder, name)), sharding.make_mesh(devices=jax.devices()[:1])
    )

  return encoder
