"""Decoders trained with adapters around a frozen base: outputs, resuming, the base's hash, devices, memory."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import TINY_DECODER, load_config, miniature_config
from tests.helpers.training_checks import (
  assert_close,
  assert_same_bits,
  assert_stopped_and_started_again_ends_with_the_same_bits,
  assert_two_processes_train_like_one,
  final_state,
  loss_and_gradients,
)
from vixml_jax import datasets, sharding
from vixml_jax.errors import InputError
from vixml_jax.experiment import evaluate_workdir, train_and_evaluate
from vixml_jax.input.batches import TrainingQueries, make_batch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, Phrase
from vixml_jax.losses import LossConfig
from vixml_jax.models import layers
from vixml_jax.models.definition import define_model
from vixml_jax.ragged import Ragged
from vixml_jax.run import configuration
from vixml_jax.run.from_config import model_of, optimizer_of, set_up
from vixml_jax.run.pretrained import trainable_params
from vixml_jax.run.state import abstract_params, abstract_state, init_params
from vixml_jax.training.start import start
from vixml_jax.training.step import device_batch, make_train_step
from vixml_jax.weights import engine
from vixml_jax.weights.peft import save_adapter

FEATURES = 6
PUBLISHED_SIZES = (294_805, 131_073)  # Training queries and labels of LF-AmazonTitles-131K.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
  """A prepared miniature with random image features and a tiny Qwen2, and a config of texts only."""
  folder = tmp_path_factory.mktemp("decoder")
  config = miniature_config(folder, "qwen2.5-0.5b")
  builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  write_random_features(builder, config.dataset.data_dir, "random", FEATURES)
  config.features.update(dict(name="random", dim=FEATURES))
  return config


@pytest.fixture
def config(workplace):
  """A copy to change."""
  return workplace.copy_and_resolve_references()


def use_images(config):
  config.images = 3
  config.fusion.modality_dropout = 0.2
  return config


def metrics(final):
  return {key: value for key, value in final.items() if "@" in key}


def test_adapters_learn_around_a_frozen_base_that_no_checkpoint_holds(config, tmp_path, capsys):
  config.train.epochs = 12
  config.train.learning_rate = 1e-2
  final = train_and_evaluate(config, tmp_path)
  epochs = [
    line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if line["split"] == "epoch"
  ]
  assert epochs[-1]["values"]["mean_loss"] < 0.9 * epochs[0]["values"]["mean_loss"]
  assert final["P@1"] > 40  # By chance 1 in 24.
  for name in ("config.json", "evaluation.json", "embeddings/labels.npy", "checkpoints", "tensorboard"):
    assert (tmp_path / name).exists(), name
  assert "P@1" in capsys.readouterr().out
  state = final_state(config, tmp_path)
  trained = {name.rpartition("/")[2] for name in engine.flatten_tree(state.params["encoder"])}
  assert trained == {"lora_a", "lora_b"} and state.params.keys() == {"encoder", "free_vectors", "prototype"}
  run = set_up(config, tmp_path)
  began = trainable_params(run.model, run.mesh, config.seed, run.weights_folder)
  for name, value in engine.flatten_tree(jax.device_get(began)).items():
    assert not np.array_equal(engine.flatten_tree(state.params)[name], value), f"{name} was not trained"
  stored = load_file(run.weights_folder / "model.safetensors")["layers.1.mlp.up_proj.weight"]
  np.testing.assert_array_equal(run.frozen["encoder"]["layers"]["up"]["kernel"][1], stored.T.astype(jnp.bfloat16))


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"encoder.pooling": "last", "prompt.template": "E V eos"},
    {"fusion.method": "late"},
    {"encoder.lora_rank": 0, "encoder.param_dtype": "float32", "encoder.bidirectional": True, "encoder.remat": True},
  ],
  ids=lambda change: ",".join(change),
)
def test_images_train_in_every_variant_and_evaluation_again_gives_the_same_numbers(config, tmp_path, change):
  use_images(config).update_from_flattened_dict(change)
  config.train.epochs = 1
  config.eval.test_images = (0,)
  configuration.check(config)
  trained = train_and_evaluate(config, tmp_path)
  assert all(np.isfinite(value) for value in metrics(trained).values())
  assert metrics(evaluate_workdir(configuration.read(tmp_path / "config.json"), tmp_path)) == metrics(trained)


@pytest.mark.parametrize("images", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["texts", "images"])
def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(config, tmp_path, monkeypatch, images):
  if images:
    use_images(config)
  config.train.epochs = 2
  assert_stopped_and_started_again_ends_with_the_same_bits(config, tmp_path, monkeypatch)


def test_another_base_is_refused_by_its_hash_and_the_same_one_may_lie_elsewhere(config, tmp_path):
  config.train.epochs = 1
  trained = train_and_evaluate(config, tmp_path / "run")
  shutil.copytree(config.encoder.pretrained, tmp_path / "moved")
  shutil.copytree(config.encoder.pretrained, tmp_path / "other")
  tensors = load_file(tmp_path / "other" / "model.safetensors")
  tensors["norm.weight"] = tensors["norm.weight"] + 1
  save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
  first, config.encoder.pretrained = config.encoder.pretrained, str(tmp_path / "other")
  for go_on in (train_and_evaluate, evaluate_workdir):
    with pytest.raises(InputError, match=f"{tmp_path / 'other'}: model.safetensors has sha256 .* {first} with"):
      go_on(config, tmp_path / "run")
  config.encoder.pretrained = str(tmp_path / "moved")
  assert metrics(evaluate_workdir(config, tmp_path / "run")) == metrics(trained)


def test_without_pretrained_weights_a_run_begins_with_random_ones(config, tmp_path):
  config.encoder.random_init = True
  config.train.epochs = 1
  run = set_up(config, tmp_path)
  assert run.weights_folder is None
  assert_same_bits(run.frozen, run.model.split(init_params(run.model, run.mesh, 0))[1])
  trained = train_and_evaluate(config, tmp_path)
  assert metrics(evaluate_workdir(config, tmp_path)) == metrics(trained)


def test_what_is_drawn_does_not_depend_on_what_is_loaded(config, tmp_path):
  run = set_up(config, tmp_path)
  drawn = trainable_params(run.model, run.mesh, 3, run.weights_folder)
  assert_same_bits(drawn, run.model.split(init_params(run.model, run.mesh, 3))[0])


def test_a_run_begins_with_adapters_in_the_format_of_peft(config, tmp_path):
  model = model_of(config)
  adapters = layers.split_lora(init_params(model, sharding.make_mesh(), 5)["encoder"])[1]
  adapters = jax.tree.map(lambda x: x + 0.5, adapters)  # What is drawn has zeros.
  save_adapter(adapters, tmp_path / "adapter", "base", config.encoder.lora_alpha)
  config.encoder.adapter = str(tmp_path / "adapter")
  began = start(set_up(config, tmp_path / "run"))
  assert_same_bits(began.state.params["encoder"], adapters)
  assert list(began.meta["adapter_sha256"]) == ["adapter_model.safetensors"]
  train_and_evaluate(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "adapter")
  evaluate_workdir(config, tmp_path / "run")  # The checkpoint has them by now.
  with pytest.raises(InputError, match="adapter_config.json: cannot be read"):
    train_and_evaluate(config, tmp_path / "another")
  assert not (tmp_path / "another").exists()  # Nothing was begun.


@pytest.mark.parametrize("free_vectors", [8, 32])
def test_free_vectors_begin_as_the_mean_embedding_of_their_labels(config, tmp_path, free_vectors):
  config.train.free_vectors = free_vectors
  run = set_up(config, tmp_path)
  state = start(run).state
  embeddings = run.encoder.queries(state.params, run.items["labels"])
  clusters = np.asarray(state.label_clusters)[:24]
  assert len(set(clusters)) == min(free_vectors, 24)
  for vector, found in enumerate(np.asarray(state.params["free_vectors"])):
    members = embeddings[clusters == vector]
    np.testing.assert_allclose(found, members.mean(0) if len(members) else np.zeros(32), atol=1e-5)


@pytest.mark.parametrize(
  "images,mesh",
  [(False, dict(data=8)), (False, dict(fsdp=8)), (False, dict(tensor=8)), (True, dict(data=2, fsdp=2, tensor=2))],
)
def test_eight_devices_give_the_loss_gradients_and_embeddings_of_one(config, tmp_path, images, mesh):
  config.prototype.num_heads = 8
  run = set_up(use_images(config) if images else config, tmp_path)
  results = [
    loss_and_gradients(run, on, run.bank and run.bank.placed(on, "device"))
    for on in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(**(dict(data=1) | mesh)))
  ]
  assert_close(*results)
  for name, gradient in engine.flatten_tree(results[0][2]["encoder"]).items():
    assert np.abs(gradient).max() > 0 and "lora_" in name, name


@pytest.mark.slow
def test_two_processes_of_four_devices_train_like_one_of_eight(config, tmp_path):
  config.mesh.update(dict(data=2, fsdp=2, tensor=2))
  assert_two_processes_train_like_one(config, tmp_path, devices=4, encoder="qwen2.5-0.5b")


def test_the_last_place_of_each_item_alone_is_pooled(config, tmp_path):
  config.encoder.pooling = "last"
  run = set_up(config, tmp_path)
  model = run.model.bind(init_params(run.model, run.mesh, 0))
  segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
  positions = np.array([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
  tokens = np.random.default_rng(0).integers(0, 160, segments.shape)
  rows = [jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions)]
  hidden, pooled = model.encoder(*rows), model.pool(*rows, 4)
  for row in range(2):
    for slot in range(1, 5):
      places = np.flatnonzero(segments[row] == slot)
      wanted = hidden[row, places[-1]] if len(places) else np.zeros(32)
      np.testing.assert_array_equal(pooled[row, slot - 1], wanted)
  assert layers.last_places(rows[1]).tolist() == [[0, 0, 1, 0, 2, 3, 0, 0], [1, 0, 0, 0, 0, 0, 0, 2]]


@pytest.mark.parametrize("unknown", [dict(architecture="gpt"), dict(pooling="first")])
def test_an_unknown_architecture_or_pooling_is_refused(unknown):
  encoder = {name: value for name, value in TINY_DECODER.items() if "lora" not in name} | dict(rope_theta=1e4)
  with pytest.raises(ValueError, match=next(iter(unknown.values()))):
    define_model(encoder, {}, 4, **({"architecture": "decoder"} | unknown))


@pytest.mark.slow
def test_memory_of_the_step_is_flat_in_the_batch_at_a_fixed_chunk():
  """Of Qwen2.5-0.5B's step on one device, compiled and not run: its arguments, outputs and temporaries together."""
  config = load_config("lf_amazon_titles_131k", "encoder=qwen2.5-0.5b")
  config.train.chunk_rows = 32
  model = model_of(config)
  optimizer = optimizer_of(config, model, 1000)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  state = abstract_state(model, optimizer, *PUBLISHED_SIZES, config.train.bank_dtype, mesh)
  frozen = model.split(abstract_params(model, mesh))[1]
  layout = PackedLayout(config.train.row_length, config.train.chunk_rows, template=(Phrase((1, 2, 3)), "text"))
  lengths = np.random.default_rng(0).integers(6, 33, 4096)
  texts = Items.of_texts(Ragged.of_lengths(np.zeros(lengths.sum(), np.int32), lengths))
  own = Ragged.of_lengths(np.arange(4096, dtype=np.int32), np.ones(4096, np.int64))
  data = TrainingQueries(texts, own, texts, np.ones(4096))

  def peak(batch_size):
    batch = make_batch(data, np.arange(4096), batch_size, layout, seed=0, epoch=0, step=0)
    step = make_train_step(
      state,
      model=model,
      optimizer=optimizer,
      layout=layout,
      loss_config=LossConfig(),
      base_key=jax.random.key(0),
      remat=config.train.remat,
      mesh=mesh,
    )
    memory = step.lower(state, frozen, device_batch(batch, mesh)).compile().memory_analysis()
    return (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )

  small, large = peak(256), peak(4096)
  assert small <= large < 1.1 * small
