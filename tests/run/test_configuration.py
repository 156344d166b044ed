"""Checks of the values of a config, and its JSON file."""

import re

from ml_collections import ConfigDict
import pytest

from tests.helpers.miniature_runs import load_config
from vixml_jax.errors import InputError
from vixml_jax.run import configuration
from vixml_jax.run.from_config import encoder_arguments


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"train.epochs": -1}, "config.train.epochs=-1: must be a whole number from 0 to 1,000,000"),
    ({"train.free_vectors": 1000}, "config.train.free_vectors=1000: must be a power of two"),
    (
      {"train.positive_sampling": "random"},
      "config.train.positive_sampling='random': must be one of propensity, uniform",
    ),
    ({"dataset.max_length": 2}, "config.dataset.max_length=2: must be a whole number from 3 to"),
    (
      {"dataset.max_length": 4096, "train.row_length": 64},
      "config.dataset.max_length=4096: must be at most config.train.row_length=64",
    ),
    (
      {"dataset.validation_fraction": 1.0},
      "config.dataset.validation_fraction=1.0: must be a number at least 0 and below 1, or -1",
    ),
    (
      {"dataset.text_fields": ()},
      "config.dataset.text_fields=(): must be a list of 1 to 2 values, each once, each one of title, content",
    ),
    ({"encoder.dtype": "float8"}, "config.encoder.dtype='float8': must be one of"),
    ({"prototype.num_heads": 7}, "config.prototype.num_heads=7: must divide config.encoder.embed_dim=384"),
    ({"loss.margin_min": 0.5}, "config.loss.margin_min=0.5: must be at most config.loss.margin_max=0.3"),
    ({"method": "siamese"}, "config.method='siamese': must be one of prime, ngame, dexa, mean"),
    ({"encoder.residual_dtype": "float64"}, "config.encoder.residual_dtype='float64': must be empty, or one of"),
    (
      {"encoder.base_dtype": "int8"},
      "config.encoder.base_dtype='int8': must be empty, since config.encoder.architecture='bert' has no frozen base",
    ),
    (
      {"encoder.remat_saved": ("up", "gate")},
      "config.encoder.remat_saved=('up', 'gate'): must be empty, or a list of 1 to 100 values, each once, each one of",
    ),
    ({"encoder.remat_saved": ("up",)}, "config.encoder.remat_saved=('up',): needs config.encoder.remat=True"),
    ({"train.chunks_in": "row"}, "config.train.chunks_in='row': must be one of encoder, layer"),
    (
      {"train.matryoshka_dims": (96, 96)},
      "config.train.matryoshka_dims=(96, 96): must be empty, or a list of 1 to 100 values, in descending order",
    ),
    ({"train.matryoshka_dims": (64, 0)}, "config.train.matryoshka_dims=(64, 0): must be empty, or a list of"),
    (
      {"train.matryoshka_dims": (512, 96)},
      "config.train.matryoshka_dims=(512, 96): must be at most config.encoder.embed_dim=384",
    ),
    ({"train.chunks_in": "layer", "train.remat": False}, "config.train.chunks_in='layer': needs config.train.remat"),
    (
      {"encoder.remat": True, "encoder.remat_saved": ("up",), "train.chunks_in": "layer"},
      "config.encoder.remat_saved=('up',): needs config.train.chunks_in='encoder'",
    ),
    ({"encoder.attention": "flash"}, "config.encoder.attention='flash': must be one of auto, reference, splash, cudnn"),
    ({"loss.reverse_weight": -1.0}, "config.loss.reverse_weight=-1.0: must be a number from 0 to 1000"),
    (
      {
        "dataset.validation_fraction": 0.0,
        "eval.retrieval_choose": False,
        "eval.blend": False,
        "eval.baselines": (),
        "eval.split": "validation",
      },
      "config.eval.split='validation': needs held-out queries",
    ),
    (
      {"dataset.validation_fraction": 0.0, "eval.retrieval_choose": True},
      "config.eval.retrieval_choose=True: needs held-out queries",
    ),
    ({"eval.retrieval_lambda": 1.5}, "config.eval.retrieval_lambda=1.5: must be a number from 0 to 1"),
    ({"eval.test_images": (0, 1)}, "config.eval.test_images=(0, 1): must be empty, since config.images=0"),
  ],
)
def test_a_bad_value_is_refused(changes, message):
  _check_refused(load_config("custom"), changes, message)


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"images": 6}, "config.images=6: must be a whole number from 0 to 5"),
    (
      {"eval.test_images": (-1,)},
      "config.eval.test_images=(-1,): must be empty, or a list of 1 to 6 values, each once, each a",
    ),
    ({"fusion.method": "middle"}, "config.fusion.method='middle': must be one of early, late"),
    ({"fusion.adapter": "conv"}, "config.fusion.adapter='conv': must be one of linear, mlp, gated, cross_attention"),
    (
      {"fusion.residual": 0.3, "fusion.method": "late"},
      "config.fusion.residual=0.3: must be 0 unless config.fusion.method is early",
    ),
    (
      {"fusion.adapter": "cross_attention", "fusion.method": "late"},
      "config.fusion.adapter=cross_attention: needs config.fusion.method=early",
    ),
    ({"prompt.template": "E"}, "no place for the images"),
    ({"fusion.bank": "disk"}, "config.fusion.bank='disk': must be one of auto, device, host"),
    ({"fusion.modality_dropout": 1.5}, "config.fusion.modality_dropout=1.5: must be a number from 0 to 1"),
  ],
)
def test_a_bad_value_for_images_is_refused(changes, message):
  _check_refused(load_config("custom", "images=3"), changes, message)


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"lora_rank": 0}, "config.encoder.param_dtype='bfloat16': must be float32, since config.encoder.lora_rank=0"),
    ({"lora_rank": -1}, "config.encoder.lora_rank=-1: must be a whole number from 0 to 65,536"),
    ({"lora_alpha": 0.0}, "config.encoder.lora_alpha=0.0: must be a number from 1e-06 to 1e+06"),
    (
      {"lora_rank": 0, "param_dtype": "float32", "adapter": "folder"},
      "config.encoder.adapter='folder': needs config.encoder.lora_rank, which is 0",
    ),
    ({"num_kv_heads": 3}, "config.encoder.num_kv_heads=3: must divide config.encoder.num_heads=14"),
    ({"head_dim": 63}, "config.encoder.head_dim=63: must be an even number from 2 to 8,192"),
    ({"rope_scaling": (8.0, 1.0)}, "config.encoder.rope_scaling=(8.0, 1.0): must be empty, or the number factor, or"),
    ({"rope_scaling": (0.0,)}, "config.encoder.rope_scaling=(0.0,): must be empty, or the number factor"),
    ({"activation": "gelu"}, "config.encoder.activation='gelu': must be one of silu, gelu_pytorch_tanh"),
    ({"global_every": 6}, "config.encoder.window=0: must be positive, since config.encoder.global_every=6"),
    ({"rope_scaling": (8.0, 4.0, 1.0, 64)}, "config.encoder.rope_scaling=(8.0, 4.0, 1.0, 64): must be empty"),
    ({"base_dtype": "int4"}, "config.encoder.base_dtype='int4': must be empty, or one of int8, float8_e4m3fn"),
    (
      {"base_dtype": "int8", "lora_rank": 0, "param_dtype": "float32"},
      "config.encoder.base_dtype='int8': must be empty, since config.encoder.lora_rank=0 trains all parameters",
    ),
    ({"param_dtype": "float16"}, "config.encoder.param_dtype='float16': must be one of float32, bfloat16"),
    ({"pooling": "first"}, "config.encoder.pooling='first': must be one of mean, last"),
    ({"architecture": "gpt"}, "config.encoder.architecture='gpt': must be one of bert, decoder"),
    ({"architecture": "bert"}, "config.encoder.max_position: is missing"),
  ],
)
def test_a_bad_value_for_a_decoder_is_refused(changes, message):
  changes = {f"encoder.{key}": value for key, value in changes.items()}
  _check_refused(load_config("custom", "encoder=qwen2.5-0.5b"), changes, message)


def _check_refused(config, changes, message):
  for key, value in changes.items():
    *sections, name = key.split(".")
    (config[sections[0]] if sections else config)[name] = value
  with pytest.raises(InputError, match=re.escape(message)):
    configuration.check(config)


def test_a_missing_key_is_refused():
  config = load_config("custom").to_dict()
  del config["train"]["epochs"]
  with pytest.raises(InputError, match="config.train.epochs: is missing"):
    configuration.check(ConfigDict(config))


def test_a_config_of_the_first_release_gets_the_keys_that_were_added_since(tmp_path):
  config = load_config("custom", "encoder=distilbert")
  wanted = {
    "method": "prime",
    "encoder.residual_dtype": "",
    "encoder.base_dtype": "",
    "encoder.remat_saved": (),
    "encoder.attention": "auto",
    "loss.reverse_weight": 1.0,
    "train.decay_layer_norms": False,
    "train.chunks_in": "encoder",
    "train.matryoshka_dims": (),
  }
  older = config.copy_and_resolve_references()
  for key in wanted:
    *sections, name = key.split(".")
    section = older[sections[0]] if sections else older
    del section[name]
  configuration.write(older, tmp_path / "config.json")
  read = configuration.read(tmp_path / "config.json")
  configuration.check(read)
  assert wanted.items() <= _flat(read).items()
  assert config.train.decay_layer_norms, "new runs of DistilBERT differ"


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b"])
def test_a_decoder_of_the_first_release_is_the_same_model_with_the_keys_that_were_added_since(name, tmp_path):
  config = load_config("custom", f"encoder={name}")
  older = config.copy_and_resolve_references()
  for key in ("zero_centered_norm", "output_norm", "activation", "scale_embedding", "attention_scalar"):
    del older.encoder[key]
  for key in ("global_every", "window", "local_rope_theta"):
    del older.encoder[key]
  configuration.write(older, tmp_path / "config.json")
  read = configuration.read(tmp_path / "config.json")
  assert encoder_arguments(read) == encoder_arguments(config)
  configuration.check_same_recipe(config, tmp_path / "config.json")


def test_a_config_is_read_as_it_was_written(tmp_path):
  config = load_config("custom", "images=3")
  configuration.write(config, tmp_path / "config.json")
  read = configuration.read(tmp_path / "config.json")
  configuration.check(read)
  assert {key: tuple(value) if isinstance(value, list) else value for key, value in _flat(read).items()} == _flat(
    config
  )


@pytest.mark.parametrize(
  "key,value",
  [
    ("mesh.fsdp", 2),
    ("eval.search", "scann"),
    ("dataset.data_dir", "other"),
    ("features.preprocessing", "big_vision"),
    ("encoder.pretrained", "other"),
    ("encoder.attention", "reference"),
  ],
)
def test_keys_that_do_not_change_parameters_may_change(tmp_path, key, value):
  config = load_config("custom")
  configuration.write(config, tmp_path / "config.json")
  section, name = key.split(".")
  config[section][name] = value
  configuration.check_same_recipe(config, tmp_path / "config.json")


def test_all_keys_that_change_parameters_and_differ_are_named(tmp_path):
  config, path = load_config("custom"), tmp_path / "config.json"
  configuration.check_same_recipe(config, path)  # Of a run that does not exist yet.
  configuration.write(config, path)
  config.train.learning_rate, config.seed, config.prompt.phrases.T = 1.0, 7, 500 * "long "
  config.train.log_every_steps = 3  # May differ.
  with pytest.raises(InputError) as caught:
    configuration.check_same_recipe(config, path)
  line = str(caught.value)
  assert line.startswith(f"{path}: this run was started with prompt.phrases.T='This product text', not 'long long ")
  assert line.endswith(
    ", and seed=0, not 7, and train.learning_rate=0.0002, not 1.0; use the old values, or another --workdir"
  )
  assert len(line) < len(str(path)) + 350


def test_an_open_key_is_not_compared(tmp_path):
  config, path = load_config("custom"), tmp_path / "config.json"
  config.dataset.validation_fraction = 0.1
  configuration.write(config, path)
  config.dataset.validation_fraction = -1.0
  configuration.check_same_recipe(config, path, left_open=["dataset.validation_fraction"])
  with pytest.raises(InputError, match="dataset.validation_fraction=0.1, not -1.0"):
    configuration.check_same_recipe(config, path)


def test_a_key_that_begins_like_one_that_may_change_must_not_change(tmp_path):
  config = load_config("custom")
  configuration.write(config, tmp_path / "config.json")
  config.encoder.attention_dropout = 0.2  # encoder.attention may change.
  with pytest.raises(InputError, match="this run was started with encoder.attention_dropout=0.1, not 0.2"):
    configuration.check_same_recipe(config, tmp_path / "config.json")


@pytest.mark.parametrize(
  "content,message",
  [
    (None, r"cannot be read \(No such file or directory\); set --workdir to the folder of a run"),
    ("{", "is not JSON .* restore the file, or train again"),
    ("[]", "is not a JSON object; restore the file, or train again"),
    (50_000 * "[", "is not JSON \\(nested too deep\\); restore the file, or train again"),
    (50_000 * '{"train": ', "is not JSON .*nested too deep.*; restore"),
    ('{"seed": ' + 5000 * "9" + "}", "is not JSON .*4,300 digits.*; restore"),
    ("{}", "config.encoder.architecture: is missing; start from configs/common.py; restore"),
    ('{"a.b": 1}', "is not a config .*; restore"),
    ('{"encoder": 7}', "config.encoder=7: must be a section with keys such as encoder.architecture; restore"),
    ('{"encoder": {"architecture": {}}}', "config.encoder.architecture: is missing"),
    ('{"encoder": {"architecture": {"x": 1}}}', "config.encoder.architecture: is a section, and must be one of bert"),
    ('{"encoder": {"architecture": "bert"}, "train": [1]}', "config.name: is missing"),
  ],
)
def test_a_missing_or_damaged_file_is_refused(tmp_path, content, message):
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  with pytest.raises(InputError, match=f"{tmp_path}/config.json: {message}"):
    configuration.read(tmp_path / "config.json")


def _flat(config):
  return configuration.flatten_config(config)
