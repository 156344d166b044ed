"""Exported models compute the same in transformers, PEFT, sentence-transformers and ONNX Runtime as here."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
import tokenizers
import torch
import transformers

from configs.common import base_config, use_encoder
from configs.encoders import ENCODERS
from tests.helpers.miniature import WORDS
from tests.helpers.miniature_runs import load_config, run_commands
from tests.helpers.tiny_workdirs import exported, tiny_config, write_info, write_workdir
from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.exporting import export
from vixml_jax.files import sha256_of_file
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.trained_encoder import load_trained_encoder
from vixml_jax.models.lora import split_lora
from vixml_jax.models.parameters import join_params
from vixml_jax.run import configuration
from vixml_jax.run.from_config import model_from_config
from vixml_jax.weights import engine, hf_config, tables

# PEFT reads a property of transformers by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Texts of many lengths: one is truncated, one has letters outside the vocabulary, one is empty.
TEXTS = [" ".join(WORDS[i % 50 : i % 50 + 1 + i % 7]) for i in range(20)] + ["cloud sun rain " * 30, "zebra, Äx 7!", ""]
TOKENS = [5, 17, 2, 9, 33, 8, 21, 40, 3, 12, 7, 25]
# What makes the attention of Gemma 3 bidirectional. The window of the tiny one is 8.
BIDIRECTIONAL = {"use_bidirectional_attention": True, "sliding_window": 5}
ADAPTED = "qwen2.5-0.5b"  # Frozen in bfloat16, with adapters; a template of two phrases and eos.
KINDS = ("minilm-l6", "distilbert", ADAPTED, "qwen3-0.6b", "llama-3.2-1b", "gemma-3-270m", "gemma-3-4b")


def hidden(model, tokens):
  with torch.no_grad():
    return model.eval()(torch.tensor([tokens])).last_hidden_state[0].numpy()


def our_hidden(encoder, tokens):
  """Returns the hidden states of one text by the encoder of this package."""
  params, length = join_params(encoder.params, encoder.frozen), len(tokens)

  @jax.jit
  def run(params):
    rows = jnp.asarray([tokens]), jnp.ones((1, length), int), jnp.arange(length)[None]
    return encoder.definition.bind(params).encoder(*rows)[0]

  return run(params)


def sentence_embeddings(folder, texts):
  """Returns what sentence-transformers computes."""
  return SentenceTransformer(str(folder), device="cpu").encode(texts).astype(np.float32)


def onnx_embeddings(folder, texts):
  """Returns what onnxruntime computes, with the tokenizer of the folder."""
  runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -c constraints.txt -e '.[onnx]'")
  info = json.loads((folder / "onnx.json").read_text())
  assert sha256_of_file(folder / info["model"]) == info["sha256"]
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  tokenizer.enable_truncation(info["max_length"])
  tokenizer.enable_padding()
  rows = tokenizer.encode_batch(texts)
  session = runtime.InferenceSession(folder / info["model"], providers=["CPUExecutionProvider"])
  inputs = [np.array([getattr(row, name) for row in rows]) for name in ("ids", "attention_mask")]
  if info["images"]:
    inputs += [np.zeros((0, info["images"]["feature_dim"]), np.float32), np.zeros((0, 2), np.int64)]
  return session.run(info["outputs"][:1], dict(zip(info["inputs"], inputs, strict=True)))[0]


@pytest.mark.parametrize("kind", [*KINDS, "minilm-l6,images=3"])
def test_sentence_transformers_give_the_embeddings_of_packed_texts(kind, encoders, tmp_path):
  encoder = encoders(kind)
  model = SentenceTransformer(str(exported(encoder.workdir, "sentence-transformers", tmp_path / "out")), device="cpu")
  found = model.encode(TEXTS, batch_size=7)
  wanted = encoder.embed(TEXTS)
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  assert (found * wanted).sum(1).min() > 0.99999
  assert (wanted @ wanted.T)[np.triu_indices(20, 1)].min() < 0.9  # Different texts have different embeddings.
  # Queries and documents have the same embeddings: no prompt is needed.
  np.testing.assert_array_equal(model.encode_query(TEXTS[:3]), model.encode_document(TEXTS[:3]))


@pytest.mark.parametrize("kind", ["minilm-l6", "distilbert", "minilm-l6,images=3"])
def test_onnx_models_give_the_embeddings_of_packed_texts(kind, encoders, tmp_path):
  pytest.importorskip("onnx", reason="needs onnx: pip install -c constraints.txt -e '.[onnx]'")
  encoder = encoders(kind)
  wanted = encoder.embed(TEXTS)
  exact = exported(encoder.workdir, "onnx", tmp_path / "float32")
  np.testing.assert_allclose(onnx_embeddings(exact, TEXTS), wanted, atol=1e-5)
  rounded = exported(encoder.workdir, "onnx", tmp_path / "int8", dtype="int8")
  assert 0.98 < (onnx_embeddings(rounded, TEXTS) * wanted).sum(1).min() < 0.999999
  assert [(folder / name).exists() for folder, name in ((exact, "model.onnx"), (rounded, "model_int8.onnx"))]


@pytest.mark.parametrize(
  "kind,dtype,message",
  [
    ("onnx", "bfloat16", "--dtype=bfloat16: --format=onnx has float32 and int8; use one of them"),
    ("hf", "int8", "--dtype=int8: --format=hf has float32 and bfloat16 and float16; use one of them"),
    ("peft", "float16", "--dtype=float16: --format=peft has float32; use it"),
    ("label-vectors", "bfloat16", "--dtype=bfloat16: --format=label-vectors has float32 and float16"),
    (
      "embeddings",
      "float32",
      "--format=embeddings: is unknown; use one of hf, peft, sentence-transformers, onnx, label",
    ),
  ],
)
def test_an_unknown_format_or_a_dtype_that_it_lacks_is_refused(kind, dtype, message, tmp_path):
  with pytest.raises(InputError, match=message):
    export.export(tmp_path, kind, tmp_path / "out", dtype=dtype)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind,encoder", [("hf", "minilm-l6"), ("peft", ADAPTED)])
def test_the_permissions_of_all_files_are_those_of_the_umask(kind, encoder, encoders, tmp_path):
  workdir, former = encoders(encoder).workdir, os.umask(0o027)
  try:
    folder = exported(workdir, kind, tmp_path / "out")
  finally:
    os.umask(former)
  assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o640}


def test_loading_prints_nothing(encoders, tmp_path):
  """In a process of its own: transformers writes to streams that pytest replaces."""
  folders = [
    exported(encoders(name).workdir, kind, tmp_path / name / kind)
    for name in ("minilm-l6", ADAPTED)
    for kind in ("hf", "sentence-transformers")
  ]
  code = (
    "import sys, transformers, sentence_transformers\n"
    "transformers.utils.logging.disable_progress_bar()\n"
    "for hf, other in zip(sys.argv[1::2], sys.argv[2::2]):\n"
    "  transformers.AutoModel.from_pretrained(hf), transformers.AutoTokenizer.from_pretrained(hf)\n"
    "  sentence_transformers.SentenceTransformer(other, device='cpu')\n"
  )
  result = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
  assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def check_ranks(name, found, wanted, labels, cosine, shared):
  """Prints and checks the cosine of embeddings to ours, and the share of the ten nearest labels that are the same."""
  found = found / np.linalg.norm(found, axis=1, keepdims=True)
  least = (found * wanted).sum(1).min()
  top = [np.argsort(-(rows @ labels.T), axis=1)[:, :10] for rows in (found, wanted)]
  same = np.mean([len({*theirs} & {*ours}) / len(ours) for theirs, ours in zip(*top, strict=True)])
  print(f"{name}: cosine at least {least:.6f}, {same:.1%} of the top ten are ours")
  assert least >= cosine and same >= shared


def transformers_embeddings(folder, texts):
  """Returns the mean over the tokens that transformers computes."""
  tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
  rows = [tokenizer(text, truncation=True, max_length=16)["input_ids"] for text in texts]
  return np.stack([hidden(model, row).mean(0) for row in rows])


@pytest.mark.parametrize(
  "kind,dtype,encode,cosine,shared",
  [
    ("hf", "float32", transformers_embeddings, 0.99999, 0.99),
    ("sentence-transformers", "float32", sentence_embeddings, 0.99999, 0.99),
    ("sentence-transformers", "float16", sentence_embeddings, 0.9999, 0.95),
    ("onnx", "float32", onnx_embeddings, 0.99999, 0.99),
    ("onnx", "int8", onnx_embeddings, 0.98, 0.8),
  ],
)
def test_every_format_ranks_labels_as_the_trained_encoder(kind, dtype, encode, cosine, shared, texts_only, tmp_path):
  if kind == "onnx":
    pytest.importorskip("onnx", reason="needs onnx: pip install -c constraints.txt -e '.[onnx]'")
  texts, labels = [query["title"] for query in texts_only.queries], texts_only.embeddings("labels")
  found = encode(exported(texts_only.workdir, kind, tmp_path / "out", dtype=dtype), texts)
  check_ranks(f"{kind} {dtype}", found, load_predictor(texts_only.workdir).encode(texts), labels, cosine, shared)


def test_a_quantized_base_is_exported_as_the_weights_that_it_was_trained_with(tmp_path, caplog):
  config = tiny_config(tmp_path, ADAPTED)
  config.encoder.base_dtype = "int8"
  workdir = write_workdir(tmp_path / "run", config)
  encoder = load_trained_encoder(workdir, sharding.make_mesh(devices=jax.devices()[:1]))
  base = engine.flatten_tree(encoder.frozen["encoder"])
  assert base["layers/up/kernel"].dtype == np.int8 and base["layers/up/kernel_scale"].dtype == np.float32
  model = transformers.AutoModel.from_pretrained(exported(workdir, "hf", tmp_path / "out"))
  # The same adapters around the dequantized kernels, whose activations are not quantized.
  config.encoder.update(dict(base_dtype="", param_dtype="float32"))
  definition = model_from_config(config)
  kernels = {
    path: np.float32(base[path]) * np.expand_dims(scale, tuple(range(1, 1 + base[path].ndim - scale.ndim)))
    for path, scale in ((name.removesuffix("_scale"), base[name]) for name in base if name.endswith("_scale"))
  }
  kept = {name: np.float32(value) for name, value in base.items() if not name.endswith("_scale")}
  frozen = {"encoder": engine.unflatten_tree(kept | kernels)}
  exact = dataclasses.replace(encoder, definition=definition, frozen=frozen)
  assert len(kernels) == 7
  np.testing.assert_allclose(hidden(model, TOKENS), our_hidden(exact, TOKENS), atol=2e-5)
  found, wanted = hidden(model, TOKENS).mean(0), np.asarray(our_hidden(encoder, TOKENS)).mean(0)
  assert found @ wanted > 0.99 * np.linalg.norm(found) * np.linalg.norm(wanted)
  with caplog.at_level("WARNING"):
    exported(workdir, "peft", tmp_path / "adapters")
  assert "trained with a base in int8 (encoder.base_dtype)" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_automodel_loads_the_encoder_with_its_adapters_merged(kind, encoders, tmp_path):
  encoder = encoders(kind)
  folder = exported(encoder.workdir, "hf", tmp_path / "out")
  model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
  assert not report["mismatched_keys"] and not report["unexpected_keys"] and not report["missing_keys"]
  np.testing.assert_allclose(hidden(model, TOKENS), our_hidden(encoder, TOKENS), atol=2e-5)
  ids = transformers.AutoTokenizer.from_pretrained(folder)("cloud sun")["input_ids"]
  assert ids == list(encoder.tokenizer.uncut("cloud sun"))  # The template is not applied.
  original = encoder.workdir / "tokenizer"
  assert hf_config.encoder_arguments(folder) == hf_config.encoder_arguments(original)


@pytest.mark.parametrize("kind", ["distilbert", "llama-3.2-1b"])
def test_a_config_is_made_where_the_tokenizer_came_from_another_model(kind, encoders, tmp_path):
  encoder = encoders(kind)
  workdir = shutil.copytree(encoder.workdir, tmp_path / "run")
  (workdir / "tokenizer/config.json").write_text(json.dumps({"model_type": "albert"}))
  write_info(workdir)
  model = transformers.AutoModel.from_pretrained(exported(workdir, "hf", tmp_path / "out"))
  np.testing.assert_allclose(hidden(model, TOKENS), our_hidden(encoder, TOKENS), atol=2e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_config_made_of_an_encoder_says_what_it_is(name, tmp_path):
  config = base_config()
  use_encoder(config, name)
  arguments = model_from_config(config).arguments["encoder"]
  made = hf_config.config_of(arguments)
  (tmp_path / "config.json").write_text(json.dumps(made))
  hf_config.check_arguments(tmp_path, arguments)
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  assert theirs.num_hidden_layers == arguments["num_layers"] and theirs.hidden_size == arguments["embed_dim"]
  with torch.device("meta"):
    parameters = transformers.AutoModel.from_config(theirs, dtype=torch.float32).state_dict()
  table = tables.TABLES[made["model_type"]]
  shapes = split_lora(model_from_config(config).shapes["encoder"])[0]
  inverse = engine.Inverse(table, shapes)
  wanted = {name: inverse.shape(name) for name in inverse.names()}
  assert {name: tuple(value.shape) for name, value in parameters.items() if "pooler" not in name} == wanted


def test_encoders_that_transformers_lacks_are_refused_by_key():
  config = base_config()
  use_encoder(config, "qwen2.5-0.5b")
  arguments = model_from_config(config).arguments["encoder"]
  with pytest.raises(InputError, match=r"encoder\.qkv_bias=True, encoder\.qk_norm=True, .*no supported model"):
    hf_config.config_of(arguments | {"qk_norm": True})
  with pytest.raises(InputError, match=r"layer_norm_eps is 1e-05, but a distilbert model has 1e-12"):
    use_encoder(config, "distilbert")
    hf_config.config_of(config.encoder.to_dict() | {"layer_norm_eps": 1e-5})
  use_encoder(config, "gemma-3-1b")
  arguments = model_from_config(config).arguments["encoder"]
  with pytest.raises(InputError, match=r"encoder\.output_norm is False, but a gemma3_text model has True"):
    hf_config.config_of(arguments | {"output_norm": False})
  with pytest.raises(InputError, match=r"encoder\.activation is silu, but a gemma3_text model has gelu_pytorch_tanh"):
    hf_config.config_of(arguments | {"activation": "silu"})


def test_large_weights_are_several_files_of_the_dtype_wanted(encoders, tmp_path):
  workdir = encoders("minilm-l6").workdir
  whole = exported(workdir, "hf", tmp_path / "whole")
  parts = exported(workdir, "hf", tmp_path / "parts", dtype="bfloat16", max_shard_bytes=15_000)
  index = json.loads((parts / "model.safetensors.index.json").read_text())
  files = sorted(parts.glob("*.safetensors"))
  assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
  total = 0
  for path in files:
    tensors = load_file(path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    total += size
    assert size <= 15_000
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    assert {index["weight_map"][name] for name in tensors} == {path.name}
  assert index["metadata"]["total_size"] == total
  model = transformers.AutoModel.from_pretrained(parts)
  assert model.dtype == torch.bfloat16
  wanted = load_file(whole / "model.safetensors")
  for name, tensor in model.state_dict().items():
    np.testing.assert_array_equal(tensor.float(), wanted[name].astype(jnp.bfloat16).astype(np.float32))
    assert tensor.any() != ("pooler" in name)


@pytest.mark.parametrize("kind,options", [(ADAPTED, {}), ("gemma-3-270m", BIDIRECTIONAL), ("gemma-3-4b", {})])
def test_peft_puts_the_adapters_onto_their_base(kind, options, encoders, tmp_path, caplog):
  encoder = encoders(kind)
  folder = exported(encoder.workdir, "peft", tmp_path / "out")
  loading = "".join(f", {key}={value}" for key, value in options.items())
  assert not options or f"with AutoModel.from_pretrained({encoder.config.encoder.pretrained!r}{loading})" in caplog.text
  assert f'from_pretrained("."{loading})' in (folder / "README.md").read_text()
  model = peft.AutoPeftModelForFeatureExtraction.from_pretrained(folder, **options)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" not in name:  # The base was frozen in bfloat16.
        parameter.copy_(parameter.bfloat16())
    for name, buffer in model.named_buffers():
      if name.endswith("embed_scale"):  # transformers rounds it to the dtype of the word vectors.
        buffer.copy_(buffer.bfloat16())
  wanted = our_hidden(encoder, TOKENS)
  np.testing.assert_allclose(hidden(model, TOKENS), wanted, atol=2e-5)
  with model.disable_adapter():
    assert np.abs(hidden(model, TOKENS) - wanted).max() > 0.3
  items = exported(encoder.workdir, "sentence-transformers", tmp_path / "items")  # Its tokenizer makes whole items.
  tokenizer = transformers.AutoTokenizer.from_pretrained(items)
  found = np.stack([hidden(model, tokenizer(text, truncation=True)["input_ids"]).mean(0) for text in TEXTS])
  check_ranks("peft float32", found, encoder.embed(TEXTS), encoder.embed(TEXTS), cosine=0.99999, shared=0.98)
  assert (folder / "tokenizer.json").is_file()


def test_adapters_of_a_bidirectional_base_with_an_image_tower_are_refused(tmp_path):
  config = tiny_config(tmp_path, "gemma-3-4b")
  config.encoder.bidirectional = True
  workdir = write_workdir(tmp_path / "run", config)
  with pytest.raises(InputError, match=r"is bidirectional \(encoder\.bidirectional\), .*use --format=hf"):
    export.export(workdir, "peft", tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "kind,encoder,values,message",
  [
    ("peft", "minilm-l6", dict(), r"has no adapters, .*\(encoder.lora_rank=0\); use --format=hf"),
    ("peft", "qwen2.5-tiny", dict(), r"has no adapters, .*\(encoder.lora_rank=0\); use --format=hf"),
    ("peft", ADAPTED, dict(encoder=dict(random_init=True)), r"belong to a random base .*use --format=hf"),
    (
      "sentence-transformers",
      "minilm-l6,images=2",
      dict(fusion=dict(method="late")),
      r"a layer after the pooling .*\(fusion\.method=late\).*use --format=hf for the encoder alone",
    ),
    ("onnx", ADAPTED, dict(), r"a model with encoder\.architecture=decoder cannot be an ONNX model"),
    (
      "sentence-transformers",
      ADAPTED,
      dict(images=2, prompt=dict(template="I V eos")),
      r"its items have no text \(prompt\.template='I V eos' lacks E\)",
    ),
  ],
)
def test_a_format_that_cannot_represent_the_model_is_refused(kind, encoder, values, message, tmp_path):
  config = load_config("custom", f"encoder={encoder}")
  config.update(values)
  (tmp_path / "run").mkdir()
  configuration.write(config, tmp_path / "run/config.json")
  with pytest.raises(InputError, match=message):
    export.export(tmp_path / "run", kind, tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_trained_encoder_embeds_elsewhere_as_evaluation_did(texts_only, tmp_path):
  model = SentenceTransformer(
    str(exported(texts_only.workdir, "sentence-transformers", tmp_path / "out")), device="cpu"
  )
  found = model.encode([query["title"] for query in texts_only.queries])
  np.testing.assert_allclose(found, texts_only.embeddings("test_queries"), atol=2e-5)


def test_an_output_that_exists_or_cannot_be_written_is_refused(encoders, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full/file").touch()
  workdir = encoders("minilm-l6").workdir
  with pytest.raises(InputError, match="full: exists already; use a new folder"):
    export.export(workdir, "hf", tmp_path / "full")
  with pytest.raises(InputError, match="file/out: cannot be written"):
    export.export(workdir, "hf", tmp_path / "full/file/out")


def test_the_command_exports_and_reports_errors(encoders, tmp_path):
  workdir = f"--workdir={encoders('minilm-l6').workdir}"
  hf = ["export", workdir, "--format=hf"]
  found = run_commands(
    {
      "good": [*hf, f"--output={tmp_path}/good", "--max_shard_size=20KB", "--dtype=float16"],
      "size": [*hf, f"--output={tmp_path}/size", "--max_shard_size=5"],
      "format": ["export", workdir, f"--output={tmp_path}/format"],
      "workdir": ["export", f"--workdir={tmp_path}", "--format=hf", f"--output={tmp_path}/workdir"],
    },
    tmp_path,
  )
  assert found["good"][:2] == (0, f"hf in {tmp_path}/good\n"), found["good"][2]
  assert (tmp_path / "good/model.safetensors.index.json").is_file()
  messages = {
    "size": "--max_shard_size=5: must be",
    "format": "--format: must be given",
    "workdir": f"{tmp_path}/config.json: cannot be read",
  }
  for name, message in messages.items():
    status, _, stderr = found[name]
    assert status == 1 and stderr.startswith(f"error: {message}") and stderr.count("\n") == 1, stderr
