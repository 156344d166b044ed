"""Initial parameters: random values do not depend on loaded weights, and all are random without weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import assert_same_bits
from vixml_jax.run.pretrained import trainable_params
from vixml_jax.run.setup import set_up_run
from vixml_jax.run.state import init_params


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
  """Folder and config of a tiny decoder with adapters."""
  folder = tmp_path_factory.mktemp("pretrained")
  return folder, miniature_config(folder, "qwen2.5-0.5b", num_train=16)


def test_random_parameters_do_not_depend_on_loaded_weights(workplace, tmp_path):
  setup = set_up_run(workplace[1], tmp_path, extract=True)
  params = trainable_params(setup.model, setup.mesh, 3, setup.weights_folder)
  assert_same_bits(params, setup.model.split(init_params(setup.model, setup.mesh, 3))[0])


def test_frozen_parameters_are_those_of_the_file(workplace, tmp_path):
  setup = set_up_run(workplace[1], tmp_path, extract=True)
  stored = load_file(setup.weights_folder / "model.safetensors")["layers.1.mlp.up_proj.weight"]
  frozen = setup.load_encoder().frozen["encoder"]["layers"]["up"]["kernel"]
  np.testing.assert_array_equal(frozen[1], stored.T.astype(jnp.bfloat16))


def test_without_pretrained_weights_the_frozen_parameters_are_random(workplace, tmp_path):
  config = workplace[1].copy_and_resolve_references()
  config.encoder.random_init = True
  setup = set_up_run(config, tmp_path, extract=True)
  assert setup.weights_folder is None
  assert_same_bits(setup.load_encoder().frozen, setup.model.split(init_params(setup.model, setup.mesh, 0))[1])
