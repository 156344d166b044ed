"""Adapters in PEFT's format: we read what PEFT writes and the reverse; anything else is an error that names the key."""

import json
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import peft as theirs
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tests.helpers import tiny_decoders, tiny_encoders
from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.lora import split_lora
from vixml_jax.models.parameters import merge_params
from vixml_jax.run.pretrained import load_pretrained_encoder
from vixml_jax.weights import engine, hf_config, peft

# PEFT uses the old name of a property of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK, ALPHA = 4, 6.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {"base": transformers.Qwen2Model, "causal": transformers.Qwen2ForCausalLM}


def _peft_model(kind="base", **options):
  """A tiny Qwen2 of transformers with random adapters on it, B included, by PEFT."""
  torch.manual_seed(0)
  settings = dict(use_rslora=True, r=RANK, lora_alpha=int(ALPHA), target_modules=TARGETS, lora_dropout=0.0)
  model = theirs.get_peft_model(
    KINDS[kind](tiny_decoders.transformers_config("qwen2")), theirs.LoraConfig(**settings | options)
  )
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.normal_(std=0.2)
  return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Folders of the base and of the adapters that PEFT wrote, and the model of both."""
  folder = tmp_path_factory.mktemp("qwen2")
  model = _peft_model()
  model.save_pretrained(folder / "adapter")
  base = KINDS["base"](tiny_decoders.transformers_config("qwen2"))
  tensors = model.get_base_model().state_dict()
  base.load_state_dict({name: tensors[name.replace("_proj.", "_proj.base_layer.")] for name in base.state_dict()})
  base.save_pretrained(folder / "base")
  return folder / "base", folder / "adapter", model


@pytest.fixture(scope="module")
def abstract(saved):
  """Shapes of our decoder's adapters."""
  arguments = hf_config.encoder_arguments(saved[0]) | dict(lora_rank=RANK, lora_alpha=ALPHA)
  return split_lora(tiny_decoders.abstract(**arguments)[1])[1]


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of the adapter's folder that can be changed."""
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    (tmp_path / name).write_bytes((saved[1] / name).read_bytes())
  return tmp_path


def _change(folder, **values):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_adapters_that_peft_saved_compute_the_same_here(saved, abstract):
  base, adapter, model = saved
  found = peft.load_adapter(adapter, abstract, ALPHA)
  graphdef, params = tiny_decoders.with_adapters(base, engine.flatten_tree(found), lora_rank=RANK, lora_alpha=ALPHA)
  texts = tiny_encoders.texts([5, 9, 3])
  tokens, mask = tiny_encoders.padded(texts)
  with torch.no_grad():
    wanted = tiny_decoders.run_theirs(model, tokens, mask).last_hidden_state.numpy()
    plain = tiny_decoders.run_theirs(transformers.Qwen2Model.from_pretrained(base), tokens, mask)
  packed = tiny_encoders.packed([[text] for text in texts], 9)
  hidden = jax.jit(lambda params: merge_params(graphdef, params)(*packed))(params)
  for row, text in enumerate(texts):
    np.testing.assert_allclose(hidden[row, : len(text)], wanted[row, : len(text)], atol=1e-4)
  assert np.abs(plain.last_hidden_state.numpy() - wanted).max() > 0.1  # The adapters have an effect.


def test_adapters_that_we_save_peft_loads_by_name_and_computes_the_same_with(saved, abstract, tmp_path):
  base, adapter, model = saved
  params = jax.tree.map(jnp.asarray, peft.load_adapter(adapter, abstract, ALPHA))
  peft.save_adapter(params, tmp_path / "ours", str(base), ALPHA)
  before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "ours"))
  assert before.keys() == after.keys()
  _assert_equal(before, after)
  fresh = theirs.get_peft_model(
    transformers.AutoModel.from_pretrained(base), theirs.LoraConfig.from_pretrained(tmp_path / "ours")
  )
  report = theirs.set_peft_model_state_dict(fresh, theirs.load_peft_weights(tmp_path / "ours", device="cpu"))
  assert not report.unexpected_keys
  assert not [name for name in report.missing_keys if "lora_" in name]
  again = theirs.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "ours").eval()
  assert again.peft_config["default"].use_rslora and again.peft_config["default"].r == RANK
  tokens = torch.arange(20).reshape(2, 10)
  with torch.no_grad():
    wanted = model(tokens).last_hidden_state
    for loaded in (fresh.eval(), again):
      # Not bit by bit: transformers now uses another implementation of attention.
      torch.testing.assert_close(loaded(tokens).last_hidden_state, wanted, atol=1e-5, rtol=1e-5)


def test_adapters_of_a_causal_model_are_read_by_their_longer_names(abstract, tmp_path):
  model = _peft_model("causal", task_type="CAUSAL_LM")
  model.save_pretrained(tmp_path)
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  name = "layers.2.self_attn.o_proj.lora_{}.weight"
  found = peft.load_adapter(tmp_path, abstract, ALPHA)["layers"]["attention"]["output"]
  heads = tensors[f"base_model.model.model.{name.format('A')}"].reshape(RANK, tiny_decoders.HEADS, -1)
  np.testing.assert_array_equal(found["lora_a"][2], heads.transpose(1, 2, 0))
  np.testing.assert_array_equal(found["lora_b"][2], tensors[f"base_model.model.model.{name.format('B')}"].T)


def test_adapters_chosen_by_pattern_are_recognized_by_their_tensors(abstract, tmp_path):
  _peft_model(target_modules="all-linear").save_pretrained(tmp_path / "all")
  _peft_model(target_modules=r".*_proj").save_pretrained(tmp_path / "pattern")
  _assert_equal(*(peft.load_adapter(tmp_path / name, abstract, ALPHA) for name in ("all", "pattern")))
  _peft_model(target_modules=r".*[qv]_proj").save_pretrained(tmp_path / "few")
  with pytest.raises(InputError, match=r"30 unfilled: -layers/attention/key/lora_a \(from layers\.0\.self_attn\.k_p"):
    peft.load_adapter(tmp_path / "few", abstract, ALPHA)


def test_adapters_load_into_sharded_arrays(saved, abstract):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  where = jax.tree.map(
    lambda x: NamedSharding(mesh, PartitionSpec(None, "fsdp" if x.shape[1] % 2 == 0 else None)), abstract
  )
  found = peft.load_adapter(saved[1], abstract, ALPHA, where)
  assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, found, where))
  _assert_equal(found, peft.load_adapter(saved[1], abstract, ALPHA))


def test_a_base_is_loaded_without_adapters(saved):
  arguments = hf_config.encoder_arguments(saved[0]) | dict(lora_rank=RANK, lora_alpha=ALPHA, param_dtype="bfloat16")
  graphdef, shapes, axes = tiny_decoders.abstract(**arguments)
  model = ModelDefinition({"encoder": arguments}, graphdef, {"encoder": shapes}, {"encoder": axes})
  base = load_pretrained_encoder(saved[0], model, sharding.make_mesh(data=4, fsdp=2))["encoder"]
  wanted, _ = split_lora(shapes)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), base) == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)
  stored = load_file(saved[0] / "model.safetensors")["layers.1.mlp.up_proj.weight"]
  np.testing.assert_array_equal(base["layers"]["up"]["kernel"][1], stored.T.astype(jnp.bfloat16))


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(r=8), "r is 8, but encoder.lora_rank is 4; set it to 8"),
    (dict(lora_alpha=16), "lora_alpha is 16, but encoder.lora_alpha is 6; set it to 16"),
    (dict(r="4"), "r is '4'; it must be a positive number"),
    (dict(lora_alpha=None), "lora_alpha is None; it must be a positive number"),
    (dict(peft_type="LOHA"), "peft_type is 'LOHA'; it must be 'LORA'"),
    (dict(bias="all"), "bias is 'all'; it must be 'none'"),
    (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'; it must be True or False"),
    (dict(use_dora=True), "'use_dora' is True; only plain LoRA"),
    (dict(modules_to_save=["embed_tokens"]), r"'modules_to_save' is \['embed_tokens'\]; only plain LoRA"),
    (
      dict(rank_pattern={"q_proj": 8}),
      r"'rank_pattern' is \{'q_proj': 8\}; only plain LoRA, equal on every layer, is supported: set it to null",
    ),
    (dict(alpha_pattern={"q_proj": 8}), "'alpha_pattern' is"),
    (dict(layers_to_transform=[0]), r"'layers_to_transform' is \[0\]"),
    (dict(a_later_invention=1), "'a_later_invention' is 1; only plain LoRA"),
    (dict(target_modules=["q_proj", "v_proj"]), "target_modules are q_proj, v_proj; they must be down_"),
    (dict(target_modules=[*TARGETS, "lm_head"]), "target_modules are .*lm_head"),
  ],
)
def test_unsupported_configs_raise_an_error_that_names_the_key(folder, abstract, change, message):
  _change(folder, **change)
  with pytest.raises(InputError, match=f"adapter_config.json: {message}") as error:
    peft.load_adapter(folder, abstract, ALPHA)
  assert "\n" not in str(error.value)


def test_the_alpha_that_replaces_a_scale_over_the_rank_computes_the_same(saved, folder, abstract):
  _change(folder, use_rslora=False)
  message = r"use_rslora is false, .* set use_rslora to true and lora_alpha to 3 \(= 6 / sqrt\(4\)\) in the file"
  with pytest.raises(InputError, match=message):
    peft.load_adapter(folder, abstract, ALPHA)
  outputs = []
  for change in (dict(), dict(use_rslora=True, lora_alpha=3)):
    _change(folder, **change)
    model = theirs.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(saved[0]), folder).eval()
    with torch.no_grad():
      outputs.append(model(torch.arange(8)[None]).last_hidden_state)
  assert torch.equal(*outputs)
  _assert_equal(peft.load_adapter(folder, abstract, 3.0), peft.load_adapter(saved[1], abstract, ALPHA))


def test_tensors_that_do_not_fit_are_listed(folder, abstract):
  file = folder / "adapter_model.safetensors"
  tensors = load_file(file)
  name = "base_model.model.layers.0.mlp.up_proj.lora_{}.weight"
  a, b = name.format("A"), name.format("B")
  save_file(tensors | {"base_model.model.lm_head.lora_A.weight": tensors[a]}, file)
  with pytest.raises(InputError, match=r"1 unmapped: \+base_model\.model\.lm_head\.lora_A\.weight$"):
    peft.load_adapter(folder, abstract, ALPHA)
  save_file({key: value for key, value in tensors.items() if key != b}, file)
  with pytest.raises(InputError, match=r"1 unfilled: -layers/up/lora_b \(from layers\.0\.mlp\.up_proj\.lora_B\.weight"):
    peft.load_adapter(folder, abstract, ALPHA)
  save_file(tensors | {a: tensors[a][:2].copy()}, file)
  with pytest.raises(InputError, match=rf"1 wrong shape: {a} is \[2, 32\], expected \[4, 32\]$"):
    peft.load_adapter(folder, abstract, ALPHA)
  save_file(tensors | {a.replace("model.layers", "model.model.layers"): tensors[a]}, file)
  with pytest.raises(InputError, match=r"1 duplicate: base_model\.model"):
    peft.load_adapter(folder, abstract, ALPHA)


def test_missing_and_damaged_files_raise_an_error_that_names_them(folder, abstract):
  file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
  file.write_bytes(file.read_bytes()[:500])
  with pytest.raises(InputError, match=r"adapter_model\.safetensors: is not a complete safetensors file"):
    peft.load_adapter(folder, abstract, ALPHA)
  file.rename(folder / "adapter_model.bin")
  with pytest.raises(InputError, match=r"has no adapter_model\.safetensors; save the adapter again"):
    peft.load_adapter(folder, abstract, ALPHA)
  for content, message in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
    settings.write_text(content)
    with pytest.raises(InputError, match=rf"adapter_config\.json: {message}"):
      peft.load_adapter(folder, abstract, ALPHA)
  settings.unlink()
  with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read .* give a folder that PEFT saved"):
    peft.load_adapter(folder, abstract, ALPHA)


def test_saving_an_incomplete_set_of_adapters_raises_an_error(saved, abstract, tmp_path):
  params = peft.load_adapter(saved[1], abstract, ALPHA)
  del params["layers"]["gate"]
  with pytest.raises(InputError, match=r"2 unfilled: -layers/gate/lora_a, -layers/gate/lora_b$"):
    peft.save_adapter(params, tmp_path / "out", "base", ALPHA)
  assert not (tmp_path / "out").exists()


def test_alpha_is_written_unchanged(saved, abstract, tmp_path):
  params = peft.load_adapter(saved[1], abstract, ALPHA)
  for alpha in (256.0, math.sqrt(2)):
    peft.save_adapter(params, tmp_path, "base", alpha)
    assert theirs.LoraConfig.from_pretrained(tmp_path).lora_alpha == alpha
    assert peft.load_adapter(tmp_path, abstract, alpha).keys() == params.keys()
