"""The configs and their variants: abstract state at full size, two training steps on a miniature, and recipes."""

import math
import re

import jax
import pytest

from tests.helpers import tiny_decoders
from tests.helpers.image_features import write_random_features
from tests.helpers.miniature import expect_miniature, write_raw_folder
from tests.helpers.miniature_runs import TINY, load_config, shrink, write_encoder
from vixml_jax import datasets, sharding
from vixml_jax.errors import InputError
from vixml_jax.input.batches import steps_per_epoch
from vixml_jax.models.lora import split_lora
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import Checkpointer
from vixml_jax.run.chosen import with_free_vectors
from vixml_jax.run.from_config import model_from_config
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


# One run for each architecture and input: BERT with and without token types, each family of decoders, texts and images.
# The others differ from them in sizes, which the abstract state checks. Each reader and encoder of a slow case runs in
# another case, or in tests of training and of export.
@pytest.mark.parametrize(
  "name,variant",
  [
    pytest.param("quickstart", None, marks=pytest.mark.slow),
    ("quickstart", "images=3"),
    ("custom", "encoder=distilbert"),
    ("lf_amazon_1.3m", "encoder=bert,images=3"),
    pytest.param("lf_amazon_131k", "encoder=qwen2.5-0.5b", marks=pytest.mark.slow),
    pytest.param("lf_amazon_1.3m", "encoder=qwen2.5-3b,images=3", marks=pytest.mark.slow),
    pytest.param("custom", "encoder=qwen3-0.6b", marks=pytest.mark.slow),
    pytest.param("custom", "encoder=llama-3.2-1b,images=3", marks=pytest.mark.slow),
    pytest.param("custom", "encoder=gemma-3-270m,images=3", marks=pytest.mark.slow),
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
      setup.config,
      tmp_path,
      checkpointer,
      setup.data,
      setup.load_encoder(),
      setup.weights_folder,
      lambda model: {},
      step=None,
    )
  assert model.step == steps_per_epoch(len(setup.data.train_rows), config.train.batch_size)
  assert model.step == 2 or config.dataset.validation_fraction
  assert all(math.isfinite(float(abs(leaf).sum())) for leaf in jax.tree.leaves(model.params))


# The recipe of the paper. The values are written here again, not imported, each with where it is published:
_TEXT = "ViXML (arXiv 2511.13189), implementation details"
_SCRIPT_OF_ENCODERS = "ViXML's run_vixml_miniLML3_amzTitles131K.sh"
_SCRIPT_OF_DECODERS = "ViXML's run_vixml_qwen25_3B_amzTitles131K.sh"
_SCRIPTS = f"{_SCRIPT_OF_ENCODERS} and {_SCRIPT_OF_DECODERS}"
_LORA = "rank-stabilized LoRA, arXiv 2312.03732"

# Key -> value and source, the same in all published configs.
SHARED = {
  "method": ("prime", _SCRIPTS + ": --prime"),
  "train.warmup_steps": (100, _SCRIPTS + ": --num_warmup_steps"),
  "train.weight_decay": (0.01, "ViXML's utils.py, prepare_optimizer_and_scheduler"),
  "train.adam_eps": (1e-6, "ViXML's utils.py, prepare_optimizer_and_scheduler"),
  "train.new_learning_rate": (5e-4, _SCRIPTS + ": -lr_combiner, -multimodal_xmc_img_proj_lr"),
  "train.free_vector_learning_rate": (5e-4, _SCRIPTS + ": -lr_combiner"),
  "train.free_vectors": (65_536, _SCRIPTS + ": --n-clusters"),
  "train.positive_sampling": ("propensity", _SCRIPTS + ": --pos_freq_sampling"),
  "train.sampling_a": (0.6, _SCRIPTS + ": -A"),
  "train.sampling_b": (2.6, _SCRIPTS + ": -B"),
  "dataset.propensity_a": (0.6, _SCRIPTS + ": -A"),
  "dataset.propensity_b": (2.6, _SCRIPTS + ": -B"),
  "dataset.validation_fraction": (0.0, _TEXT + ": the last epoch is reported"),
  "loss.num_negatives": (10, _SCRIPTS + ": --num-negatives"),
  "loss.margin_min": (0.1, _SCRIPTS + ": --margin_min"),
  "loss.margin_max": (0.3, _SCRIPTS + ": --margin_max"),
  "loss.regulariser_weight": (0.1, _SCRIPTS + ": --mi_reg_weight"),
  "loss.temperature": (0.1, "ViXML's loss.py, ATripletMarginLossOHNMDM: tau"),
  "loss.regulariser_margin": (0.1, "ViXML's loss.py, RegLoss: margin"),
  "loss.reverse_weight": (1.0, "PRIME (arXiv 2410.20401), LF-AmazonTitles-131K.json: loss_dual"),
  "prototype.num_heads": (8, _SCRIPTS + ": --combiner_heads"),
  "prototype.mlp_dim": (1024, _SCRIPTS + ": --combiner_dim"),
  "prototype.dropout": (0.1, "torch.nn.TransformerEncoderLayer's default"),
  "mining.cluster_size": (16, _SCRIPTS + ": --cl-size"),
  "fusion.method": ("early", _TEXT),
  "fusion.adapter": ("linear", _TEXT),
  "fusion.residual": (0.0, _TEXT),
  "fusion.modality_dropout": (0.0, _TEXT),
  "features.dim": (1152, _SCRIPTS + ": *_embs_imgs_3_1152_siglip2.npy"),
  "encoder.pooling": ("mean", _SCRIPTS + ": --decoder_model_pooling"),
  "eval.retrieval_augmented": (True, _TEXT),
  "eval.retrieval_choose": (False, _TEXT),
  "eval.retrieval_search": ("joint", "ViXML's eval_mm.py: --retrieval_augmented_split is off"),
  "eval.retrieval_hits": (500, "ViXML's eval_mm.py: --retrieval_augmented_k"),
  "eval.retrieval_lambda": (0.9, "ViXML's eval_mm.py: 1 - --retrieval_augmented_lambda"),
  "eval.retrieval_temperature": (0.05, "ViXML's eval_mm.py: --retrieval_augmented_tau"),
}
OF_ENCODERS = {
  "seed": (0, "ViXML's main.py: --seed"),
  "mining.start_epoch": (10, _SCRIPT_OF_ENCODERS + ": --cl-start"),
  "mining.update_epochs": (5, _SCRIPT_OF_ENCODERS + ": --cl-update"),
  "mining.doubling_epochs": ((20, 40, 60, 80, 100, 120), _SCRIPT_OF_ENCODERS + ": --curr-steps"),
  "train.clip_norm": (0.0, _TEXT),
  "train.free_vector_init": ("xavier", _SCRIPT_OF_ENCODERS + ": no --init_fv_w_embeddings"),
  "prompt.template": ("V E", _SCRIPT_OF_ENCODERS + ": --img_prefix, --txt_prefix and --closing_suffix are empty"),
  "encoder.dropout": (0.1, "config.json of the weights"),
  "encoder.attention_dropout": (0.1, "config.json of the weights"),
}
OF_DECODERS_TOO = {
  "seed": (42, _SCRIPT_OF_DECODERS + ": --seed"),
  "mining.start_epoch": (4, _SCRIPT_OF_DECODERS + ": --cl-start"),
  "mining.update_epochs": (2, _SCRIPT_OF_DECODERS + ": --cl-update"),
  "mining.doubling_epochs": ((8, 12, 16, 20, 24), _SCRIPT_OF_DECODERS + ": --curr-steps"),
  "train.clip_norm": (1.0, _TEXT),
  "train.free_vector_init": ("cluster_mean", _SCRIPT_OF_DECODERS + ": --init_fv_w_embeddings"),
  "encoder.lora_rank": (256, _SCRIPT_OF_DECODERS + ": --lora_rank"),
  "encoder.lora_alpha": (256.0, _SCRIPT_OF_DECODERS + ": --lora_alpha; scaled by alpha / sqrt(rank), " + _LORA),
  "encoder.param_dtype": ("bfloat16", _SCRIPT_OF_DECODERS + ": --bfloat16"),
  "encoder.dtype": ("bfloat16", _SCRIPT_OF_DECODERS + ": --bfloat16"),
  "encoder.bidirectional": (False, _TEXT),
  "prompt.template": ("T E I V eos", _TEXT + ", prompt templates"),
  "prompt.phrases.T": ("This product text", _SCRIPT_OF_DECODERS + ": --txt_prefix"),
  "prompt.phrases.I": ("and its image", _SCRIPT_OF_DECODERS + ": --img_prefix"),
  "prompt.eos": ("<|endoftext|>", _SCRIPT_OF_DECODERS + ": --closing_suffix"),
}
OF_SETS = {
  "lf_amazon_titles_131k": {"dataset.max_length": (32, _TEXT), "dataset.text_fields": (("title",), _TEXT)},
  "lf_amazon_131k": {"dataset.max_length": (128, _TEXT), "dataset.text_fields": (("title", "content"), _TEXT)},
  "mm_amazon_titles_300k": {"dataset.max_length": (32, _TEXT), "dataset.text_fields": (("title",), _TEXT)},
  "lf_amazon_1.3m": {"dataset.max_length": (32, _TEXT), "dataset.text_fields": (("title",), _TEXT)},
}
# Encoder -> its weights, and its batch size and learning rate on titles and on LF-Amazon-131K (all of `_TEXT`).
OF_EACH_ENCODER = {
  "minilm-l3": ("sentence-transformers/paraphrase-MiniLM-L3-v2", (2048, 5e-4), (2048, 5e-4)),
  "distilbert": ("sentence-transformers/msmarco-distilbert-base-v4", (2048, 2e-4), (1024, 1e-4)),
  "bert": ("intfloat/e5-base-v2", (2048, 1e-4), (512, 5e-5)),
  "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", (2048, 5e-5), (512, 2e-5)),
  "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", (2048, 5e-5), (512, 2e-5)),
  "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", (2048, 5e-5), (512, 2e-5)),
  "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", (1024, 5e-5), (512, 2e-5)),
}


def _expected(name, encoder, images):
  """The values of the paper for one published config, with their sources."""
  decoder = encoder.startswith("qwen")
  weights, on_titles, on_long_texts = OF_EACH_ENCODER[encoder]
  batch_size, learning_rate = on_long_texts if name == "lf_amazon_131k" else on_titles
  epochs = (40 if name == "lf_amazon_1.3m" else 30) if decoder else (150 if images else 300)
  return (
    SHARED
    | (OF_DECODERS_TOO if decoder else OF_ENCODERS)
    | OF_SETS[name]
    | {
      "images": (images, _TEXT),
      "train.epochs": (epochs, _TEXT),
      "train.batch_size": (batch_size, _TEXT),
      "train.learning_rate": (learning_rate, _TEXT),
      "encoder.pretrained": (weights, _TEXT),
      # `no_decay` lists `LayerNorm.weight`, but the norms of DistilBERT's layers have other names.
      "train.decay_layer_norms": (encoder == "distilbert", "ViXML's utils.py, prepare_optimizer_and_scheduler"),
    }
  )


def _differences(config, expected):
  found = configuration.flatten_config(config)
  plain = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
  return {key: (plain.get(key), *wanted) for key, wanted in expected.items() if plain.get(key) != wanted[0]}


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("encoder", OF_EACH_ENCODER)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_exactly_the_values_of_the_paper(name, encoder, images):
  config = load_config(name, f"encoder={encoder},images={images}")
  configuration.check(config)
  assert _differences(config, _expected(name, encoder, images)) == {}


def test_weights_are_checked_before_the_data(tmp_path):
  config = load_config("custom", "images=3")
  config.dataset.raw_dir = str(tmp_path / "absent")
  config.encoder.pretrained = str(tmp_path)
  for name in ("config.json", "pytorch_model.bin", "tokenizer.json"):
    (tmp_path / name).write_text("{}")
  with pytest.raises(InputError, match="has only pickled weights"):
    set_up_run(config, tmp_path / "run", extract=True)
  config.encoder.update(TINY)
  config.encoder.pretrained = str(write_encoder(tmp_path / "tiny", config.encoder))
  config.encoder.num_layers = 3
  with pytest.raises(InputError, match=r"config\.json: the weights have num_layers=2, but encoder\.num_layers is 3"):
    set_up_run(config, tmp_path / "run", extract=True)
  config.encoder.num_layers = 2
  with pytest.raises(InputError, match="absent"):
    set_up_run(config, tmp_path / "run", extract=True)


def test_another_value_is_noticed():
  config = load_config("lf_amazon_1.3m", "encoder=qwen2.5-3b,images=3")
  config.mining.doubling_epochs = (8, 12, 16, 20)
  config.fusion.modality_dropout = 0.2
  found = _differences(config, _expected("lf_amazon_1.3m", "qwen2.5-3b", 3))
  assert found.keys() == {"mining.doubling_epochs", "fusion.modality_dropout"}


def test_the_variant_robust_adds_what_the_paper_does_not_have_and_nothing_else():
  for variant, changed in (
    ("encoder=qwen2.5-3b,images=3", {"fusion.modality_dropout": 0.2, "fusion.residual": 0.4}),
    ("encoder=distilbert", {}),
  ):
    plain, robust = (load_config("lf_amazon_1.3m", variant + word) for word in ("", ",robust"))
    configuration.check(robust)
    before, after = configuration.flatten_config(plain), configuration.flatten_config(robust)
    assert {key: value for key, value in after.items() if before[key] != value} == changed | {
      "name": plain.name + "-robust",
      "dataset.validation_fraction": 0.01,
      "eval.retrieval_choose": True,
    }


def test_the_methods_that_prime_is_compared_with_are_variants_of_the_published_configs():
  config = load_config("lf_amazon_131k", "method=dexa,images=3")
  assert (config.method, config.name) == ("dexa", "lf_amazon_131k-distilbert-images3-dexa")
  # They have the published rates of the data set, which are set before the method is.
  assert config.train.learning_rate == config.train.free_vector_learning_rate == 1e-4


def test_configs_for_own_data_also_answer_queries_without_images():
  assert load_config("custom", "images=3").fusion.modality_dropout == 0.2
  assert load_config("quickstart", "images=3").fusion.modality_dropout == 0.2
  assert load_config("custom").fusion.modality_dropout == 0.0


@pytest.mark.parametrize(
  "name,variant",
  [
    ("custom", "encoder=gpt"),
    ("quickstart", "fast"),
    ("lf_amazon_1.3m", "fast"),
    ("lf_amazon_1.3m", "method=siamese"),
    ("custom", "images=6"),
  ],
)
def test_an_unknown_variant_is_refused(name, variant):
  with pytest.raises(ValueError, match=re.escape(variant.split("=")[-1]) if variant != "images=6" else "images"):
    load_config(name, variant)
