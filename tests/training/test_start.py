"""The checkpoint of step 0: free vectors, label clusters and adapters."""

import jax
import numpy as np
import pytest

from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import assert_same_bits, first_checkpoint, training_parts
from vixml_jax import sharding
from vixml_jax.experiment import evaluate_workdir
from vixml_jax.models.lora import split_lora
from vixml_jax.run.checkpoint import Checkpointer
from vixml_jax.run.from_config import model_from_config
from vixml_jax.run.state import init_params
from vixml_jax.weights.peft import save_adapter

NUM_LABELS = 24


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  """Config of a tiny decoder on a miniature."""
  return miniature_config(tmp_path_factory.mktemp("start"), "qwen2.5-0.5b")


@pytest.fixture
def config(decoder):
  """A copy to change."""
  return decoder.copy_and_resolve_references()


def test_each_label_has_a_free_vector_of_its_own_if_there_are_enough(tmp_path):
  config = miniature_config(tmp_path)
  config.train.free_vectors = 32
  checkpoint, _ = first_checkpoint(config, tmp_path / "run")
  np.testing.assert_array_equal(checkpoint.state.label_clusters[:NUM_LABELS], np.arange(NUM_LABELS))


@pytest.mark.parametrize("free_vectors", [8, 32])
def test_free_vectors_start_as_the_mean_embedding_of_their_labels(config, tmp_path, free_vectors):
  config.train.free_vectors = free_vectors
  assert config.train.free_vector_init == "cluster_mean"
  checkpoint, encoder = first_checkpoint(config, tmp_path)
  state = checkpoint.state
  embeddings = encoder.embed(state.params, training_parts(config, tmp_path).queries.label_items)
  clusters = np.asarray(state.label_clusters)[:NUM_LABELS]
  assert len(set(clusters)) == min(free_vectors, NUM_LABELS)
  for vector, found in enumerate(np.asarray(state.params["free_vectors"])):
    members = embeddings[clusters == vector]
    np.testing.assert_allclose(found, members.mean(0) if len(members) else np.zeros(32), atol=1e-5)


def test_a_run_starts_with_given_adapters_and_needs_their_folder_only_then(config, tmp_path):
  model = model_from_config(config)
  adapters = split_lora(init_params(model, sharding.make_mesh(), 5)["encoder"])[1]
  adapters = jax.tree.map(lambda x: x + 0.5, adapters)  # Half of the random ones are zero.
  save_adapter(adapters, tmp_path / "adapter", "base", config.encoder.lora_alpha)
  config.encoder.adapter = str(tmp_path / "adapter")
  checkpoint, _ = first_checkpoint(config, tmp_path / "run")
  assert_same_bits(checkpoint.state.params["encoder"], adapters)
  assert list(checkpoint.meta["adapter_sha256"]) == ["adapter_model.safetensors"]
  with Checkpointer(tmp_path / "run" / "checkpoints", 1) as checkpointer:
    checkpointer.save(0, checkpoint)
  (tmp_path / "adapter").rename(tmp_path / "gone")
  evaluate_workdir(config, tmp_path / "run")
