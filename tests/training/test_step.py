"""The training step: the same numbers on every mesh, with and without recomputation, and memory that stays flat."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import load_config, miniature_config
from tests.helpers.training_checks import assert_close, loss_and_gradients, one_batch, training_parts
from vixml_jax import datasets, sharding
from vixml_jax.input.batches import TrainingQueries, make_batch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, Phrase
from vixml_jax.models.definition import define_model
from vixml_jax.ragged import Ragged
from vixml_jax.run.from_config import model_from_config
from vixml_jax.run.state import abstract_params, abstract_state
from vixml_jax.training.step import device_batch, make_train_step, step_config
from vixml_jax.weights import engine

FEATURES = 6
PUBLISHED_SIZES = (294_805, 131_073)  # Training queries and labels of LF-AmazonTitles-131K.
# Name -> encoder, and changes of its config.
MODELS = {
  "bert": ("minilm-l6", {}),
  "bert with early images": ("minilm-l6", {"images": 3, "fusion.adapter": "cross_attention"}),
  "bert with late images": ("minilm-l6", {"images": 3, "fusion.method": "late", "fusion.adapter": "mlp"}),
  "decoder": ("qwen2.5-0.5b", {"prototype.num_heads": 8}),
  "decoder with images": ("qwen2.5-0.5b", {"images": 3, "prototype.num_heads": 8}),
  "decoder with local layers and images": ("gemma-3-270m", {"images": 3, "prototype.num_heads": 8}),
}


@pytest.fixture(scope="module")
def parts_of(tmp_path_factory):
  """Returns the parts of a run of a model of `MODELS`, and the loss and gradients on one device."""
  configs, made = {}, {}
  for encoder in sorted({encoder for encoder, _ in MODELS.values()}):
    folder = tmp_path_factory.mktemp(encoder)
    config = configs[encoder] = miniature_config(folder, encoder)
    builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
    write_random_features(builder, config.dataset.data_dir, "random", FEATURES)
    config.features.update(dict(name="random", dim=FEATURES))
    config.fusion.bank = "host"

  def make(name):
    if name not in made:
      encoder, changes = MODELS[name]
      config = configs[encoder].copy_and_resolve_references()
      config.update_from_flattened_dict(changes)
      parts = training_parts(config, tmp_path_factory.mktemp("run"))
      made[name] = parts, loss_and_gradients(parts, _one_device(), parts.setup.data.image_features)
    return made[name]

  return make


def _one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
  "model,mesh,where",
  [
    pytest.param("bert", dict(fsdp=8), None, marks=pytest.mark.slow),
    ("bert with early images", dict(data=2, fsdp=2, tensor=2), "device"),
    pytest.param("bert with late images", dict(data=8), "host", marks=pytest.mark.slow),
    pytest.param("decoder", dict(tensor=8), None, marks=pytest.mark.slow),
    ("decoder with images", dict(data=2, fsdp=2, tensor=2), "device"),
    pytest.param(
      "decoder with local layers and images", dict(data=2, fsdp=2, tensor=2), "device", marks=pytest.mark.slow
    ),
  ],
)
def test_eight_devices_give_the_loss_gradients_and_embeddings_of_one(parts_of, model, mesh, where):
  parts, one = parts_of(model)
  mesh = sharding.make_mesh(**(dict(data=1) | mesh))
  features = parts.setup.data.image_features
  assert_close(one, loss_and_gradients(parts, mesh, features and features.placed(mesh, where)))


def test_the_loss_over_prefixes_is_the_mean_of_their_losses_and_leaves_the_bank_its_whole_embeddings(parts_of):
  parts, (whole, embeddings, _) = parts_of("bert with early images")
  features = parts.setup.data.image_features
  of_dims = lambda *dims: dataclasses.replace(parts, step=dataclasses.replace(parts.step, matryoshka_dims=dims))
  (short, *_), (both, others, _) = (
    loss_and_gradients(of_dims(*dims), _one_device(), features) for dims in ((8,), (32, 8))
  )
  assert abs(short - whole) > 1e-4
  np.testing.assert_allclose(both, (whole + short) / 2, rtol=1e-5)
  np.testing.assert_allclose(others, embeddings, atol=1e-6)


@pytest.mark.parametrize(
  "model",
  ["bert with early images", pytest.param("bert with late images", marks=pytest.mark.slow), "decoder with images"],
)
def test_all_parameters_of_images_and_adapters_have_gradients_and_a_frozen_base_has_none(parts_of, model):
  gradients = parts_of(model)[1][2]
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["fusion"]["project"]))
  if model.startswith("decoder"):
    for name, gradient in engine.flatten_tree(gradients["encoder"]).items():
      assert np.abs(gradient).max() > 0 and "lora_" in name, name


def test_recomputing_chunks_changes_no_gradient(parts_of):
  parts, _ = parts_of("bert with early images")
  assert len(one_batch(parts, 64).items.segments) > 1
  features = parts.setup.data.image_features
  recomputed, kept = (
    loss_and_gradients(parts, _one_device(), features, remat=remat, size=64) for remat in (True, False)
  )
  for a, b in zip(*map(jax.tree.leaves, (recomputed, kept)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
  "model",
  [
    pytest.param("bert", marks=pytest.mark.slow),
    "bert with early images",
    pytest.param("bert with late images", marks=pytest.mark.slow),
    pytest.param("decoder with images", marks=pytest.mark.slow),
    "decoder with local layers and images",
  ],
)
def test_chunks_in_layers_give_the_loss_gradients_and_embeddings_of_chunks_in_the_encoder(parts_of, model):
  parts = without_dropout(parts_of(model)[0])
  filled = (one_batch(parts, 56).items.segments > 0).any((1, 2))
  assert len(filled) > filled.sum() > 1, "an empty chunk, and several others"
  features = parts.setup.data.image_features
  encoder, layer = (
    loss_and_gradients(parts, _one_device(), features, size=56, chunks_in=chunks_in)
    for chunks_in in ("encoder", "layer")
  )
  assert_close(encoder, layer)


def without_dropout(parts):
  """Returns the same parts, with a model that has no dropout."""
  arguments = parts.setup.model.arguments
  encoder = {name: 0.0 if name.endswith("dropout") else value for name, value in arguments["encoder"].items()}
  model = define_model(**arguments | {"encoder": encoder})  # Late fusion has the encoder's rates.
  setup = dataclasses.replace(parts.setup, model=model)
  return dataclasses.replace(parts, setup=setup, step=dataclasses.replace(parts.step, model=model))


@pytest.mark.slow
def test_chunks_in_layers_give_the_same_on_eight_devices(parts_of):
  parts = parts_of("decoder with images")[0]
  features = parts.setup.data.image_features
  one = loss_and_gradients(parts, _one_device(), features, size=56, chunks_in="layer")
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  assert_close(one, loss_and_gradients(parts, mesh, features.placed(mesh, "device"), size=56, chunks_in="layer"))


@pytest.mark.slow
def test_memory_of_the_step_does_not_grow_with_the_batch_if_chunks_have_a_fixed_size():
  # The step of Qwen2.5-0.5B on one device is compiled, not run: arguments, outputs and temporaries are added up.
  config = load_config("lf_amazon_titles_131k", "encoder=qwen2.5-0.5b")
  config.train.chunk_rows = 32
  model = model_from_config(config)
  mesh = _one_device()
  layout = PackedLayout(config.train.row_length, config.train.chunk_rows, template=(Phrase((1, 2, 3)), "text"))
  step = step_config(config, model, layout, 1000, PUBLISHED_SIZES[1])
  state = abstract_state(model, step.optimizer, *PUBLISHED_SIZES, config.train.bank_dtype, mesh)
  frozen = model.split(abstract_params(model, mesh))[1]
  lengths = np.random.default_rng(0).integers(6, 33, 4096)
  texts = Items.of_texts(Ragged.of_lengths(np.zeros(lengths.sum(), np.int32), lengths))
  own = Ragged.of_lengths(np.arange(4096, dtype=np.int32), np.ones(4096, np.int64))
  data = TrainingQueries(texts, own, texts, np.ones(4096))

  def peak(batch_size):
    batch = make_batch(data, np.arange(4096), batch_size, layout, seed=0, epoch=0, step=0)
    program = make_train_step(step, state, mesh)
    memory = program.lower(state, frozen, device_batch(batch, None, mesh)).compile().memory_analysis()
    return (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )

  small, large = peak(256), peak(4096)
  assert small <= large < 1.1 * small
