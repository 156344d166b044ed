"""The configs and their variants: abstract state at full size, two training steps on a miniature, and recipes."""

import math
import re

import jax
import pytest

from tests.helpers import tiny_decoders
from tests.helpers.image_features import write_random_features
from tests.helpers.miniature import expect_miniature, write_raw_folder
from tests.helpers.miniature_runs import load_config, shrink
from vixml_jax import datasets, sharding
from vixml_jax.input.batches import steps_per_epoch
from vixml_jax.models.lora import split_lora
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import Checkpointer
from vixml_jax.run.from_config import model_from_config, with_free_vectors
from vixml_jax.run.setup import set_up_run
from vixml_jax.run.state import abstract_state
from vixml_jax.training.loop import train
from vixml_jax.training.optimizer import optimizer_from_config

ENCODERS = ("minilm-l3", "minilm-l6", "distilbert", "bert")
# The decoders that the paper reports.
DECODERS = {
  "lf_amazon_titles_131k": ("qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b"),
  "lf_amazon_131k": ("qwen2.5-0.5b", "qwen2.5-3b"),
  "mm_amazon_titles_300k": ("qwen2.5-0.5b", "qwen2.5-3b"),
  "lf_amazon_1.3m": ("qwen2.5-0.5b", "qwen2.5-3b"),
}
PUBLISHED = {
  "lf_amazon_titles_131k": (294_805, 131_073),
  "lf_amazon_131k": (294_805, 131_073),
  "mm_amazon_titles_300k": (586_781, 303_296),
  "lf_amazon_1.3m": (2_248_619, 1_305_265),
}
TEXTS = [(name, f"encoder={encoder}") for name in (*PUBLISHED, "custom") for encoder in ENCODERS]
TEXTS += [("quickstart", variant) for variant in (None, "reference", "full")]
OF_DECODERS = [(name, f"encoder={encoder}") for name, encoders in DECODERS.items() for encoder in encoders]
OF_DECODERS += [("custom", f"encoder={encoder}") for encoder in tiny_decoders.PARAMETERS]
OF_DECODERS += [("quickstart", "encoder=qwen2.5-tiny")]
WITH_IMAGES = [(name, f"{variant},images=3") for name, variant in TEXTS if name != "quickstart"]
WITH_IMAGES += [("quickstart", "images=3"), ("quickstart", "full,images=3")]
DECODERS_WITH_IMAGES = [(name, f"{variant},images=3") for name, variant in OF_DECODERS]
# Encoder parameters without heads, as transformers counts them for the published checkpoints.
ENCODER_PARAMETERS = {
  "minilm-l3": 17_389_824 - 147_840,
  "minilm-l6": 22_713_216 - 147_840,
  "distilbert": 66_362_880,
  "bert": 109_482_240 - 590_592,
  "qwen2.5-tiny": 10_963_712,
} | tiny_decoders.PARAMETERS


@pytest.mark.parametrize("name,variant", TEXTS + WITH_IMAGES + OF_DECODERS + DECODERS_WITH_IMAGES)
def test_the_abstract_state_of_the_full_size_has_the_published_number_of_parameters(name, variant):
  config = load_config(name, variant)
  configuration.check(config)
  queries, labels = PUBLISHED.get(name, (17_083, 9_527))
  config = with_free_vectors(config, labels)
  mesh = sharding.make_mesh()
  model = model_from_config(config)
  steps = config.train.epochs * math.ceil(queries / config.train.batch_size)
  state = abstract_state(
    model, optimizer_from_config(config, model, steps), queries, labels, config.train.bank_dtype, mesh
  )
  assert state.bank.shape[0] >= queries and state.bank.shape[0] % 8 == 0
  assert state.centroids.shape[0] >= labels
  per_device = state.bank.sharding.shard_shape(state.bank.shape)
  assert per_device[0] * 8 == state.bank.shape[0], "the bank must be sharded over all devices"
  encoder = next((e for e in ENCODER_PARAMETERS if f"encoder={e}" in (variant or "").split(",")), "minilm-l6")
  base, adapters = split_lora(model.shapes["encoder"])
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(base)) == ENCODER_PARAMETERS[encoder]
  if encoder in tiny_decoders.PARAMETERS:
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state.params["encoder"]) == jax.tree.map(
      lambda leaf: (leaf.shape, leaf.dtype), adapters
    ), "only the adapters of the encoder are trained"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {"bfloat16"}
    assert adapters["layers"]["up"]["lora_a"].shape[-1] == 256
  fusion = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params.get("fusion", {})))
  maps = (1 + (config.fusion.residual > 0)) if config.images else 0
  assert fusion == maps * (config.features.dim + 1) * config.encoder.embed_dim, "a linear adapter and the residual"
  assert config.features.dim == (192 if config.features.checkpoint else 1152)


# One run for each architecture and input: BERT with and without token types, Qwen2, Qwen3 and Llama, texts and images.
# The others differ from them in sizes, which the abstract state checks.
@pytest.mark.parametrize(
  "name,variant",
  [
    ("quickstart", None),
    ("quickstart", "images=3"),
    ("custom", "encoder=distilbert"),
    ("lf_amazon_1.3m", "encoder=bert,images=3"),
    ("lf_amazon_131k", "encoder=qwen2.5-0.5b"),
    ("lf_amazon_1.3m", "encoder=qwen2.5-3b,images=3"),
    ("custom", "encoder=qwen3-0.6b"),
    ("custom", "encoder=llama-3.2-1b,images=3"),
  ],
)
def test_two_steps_run_on_a_miniature(name, variant, tmp_path, monkeypatch):
  config = load_config(name, variant)
  raw = write_raw_folder(tmp_path / "raw", num_train=32, images=bool(config.features.checkpoint))
  if name != "custom":
    expect_miniature(monkeypatch, config.dataset.name, raw)
  config = shrink(config, tmp_path, raw)
  config.train.epochs = 1
  if config.train.bank_dtype == "bfloat16":
    config.encoder.dtype = "bfloat16"
  if config.images and not config.features.checkpoint:
    builder = datasets.prepare(config.dataset.name, raw, config.dataset.data_dir)
    write_random_features(builder, config.dataset.data_dir, config.features.name, 6)
    config.features.dim = 6
  configuration.check(config)
  setup = set_up_run(config, tmp_path, extract=True)
  with Checkpointer(tmp_path / "checkpoints", 1) as checkpointer:
    model = train(
      setup.config, tmp_path, checkpointer, setup.data, setup.load_encoder(), setup.weights_folder, lambda model: {}
    )
  assert model.step == steps_per_epoch(len(setup.data.train_rows), config.train.batch_size)
  assert model.step == 2 or config.dataset.validation_fraction
  assert all(math.isfinite(float(abs(leaf).sum())) for leaf in jax.tree.leaves(model.params))


def test_configs_of_encoders_have_the_recipe_of_the_paper():
  config = load_config("lf_amazon_1.3m", "encoder=minilm-l3")
  assert (config.train.learning_rate, config.train.batch_size, config.train.epochs) == (5e-4, 2048, 300)
  assert config.train.free_vectors == 65_536 and config.dataset.max_length == 32
  long_texts = load_config("lf_amazon_131k", "encoder=bert")
  assert (long_texts.train.batch_size, long_texts.train.learning_rate) == (512, 5e-5)
  assert long_texts.dataset.max_length == 128 and tuple(long_texts.dataset.text_fields) == ("title", "content")


@pytest.mark.parametrize(
  "name,encoder,epochs,batch_size,learning_rate",
  [
    ("lf_amazon_titles_131k", "qwen2.5-3b", 30, 2048, 5e-5),
    ("lf_amazon_titles_131k", "qwen2.5-7b", 30, 1024, 5e-5),
    ("mm_amazon_titles_300k", "qwen2.5-0.5b", 30, 2048, 5e-5),
    ("lf_amazon_1.3m", "qwen2.5-3b", 40, 2048, 5e-5),
    ("lf_amazon_131k", "qwen2.5-3b", 30, 512, 2e-5),
  ],
)
def test_configs_of_decoders_have_the_recipe_of_the_paper(name, encoder, epochs, batch_size, learning_rate):
  config = load_config(name, f"encoder={encoder},images=3")
  train, mining = config.train, config.mining
  assert (train.epochs, train.batch_size, train.learning_rate) == (epochs, batch_size, learning_rate)
  assert (train.new_learning_rate, train.free_vector_learning_rate, train.clip_norm) == (5e-4, 5e-4, 1.0)
  assert (mining.cluster_size, mining.start_epoch, mining.update_epochs) == (16, 4, 2)
  assert mining.doubling_epochs == (8, 12, 16, 20, 24) and train.free_vector_init == "cluster_mean"
  assert (config.encoder.lora_rank, config.encoder.lora_alpha, config.encoder.pooling) == (256, 256.0, "mean")
  assert not config.encoder.bidirectional and config.prompt.template == "T E I V eos"
  assert (
    config.prompt.phrases.to_dict() == {"T": "This product text", "I": "and its image", "T2": "and its text"}
    and config.prompt.eos == "<|endoftext|>"
  )


@pytest.mark.parametrize("name,variant", [("custom", "encoder=gpt"), ("quickstart", "fast"), ("custom", "images=6")])
def test_an_unknown_variant_is_refused(name, variant):
  with pytest.raises(ValueError, match=re.escape(variant.split("=")[-1]) if variant != "images=6" else "images"):
    load_config(name, variant)
