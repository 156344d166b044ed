"""Folders of Hugging Face: loading, saving, shards, dtypes, older names, and files that cannot be read."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tests.helpers import tiny_decoders, tiny_encoders, weight_files
from vixml_jax.errors import InputError
from vixml_jax.models.parameters import merge_params
from vixml_jax.weights import engine, hf_config, hf_folder, tables


@pytest.fixture(scope="module", params=["bert", "distilbert", *tiny_decoders.KINDS])
def saved(request, tmp_path_factory):
  """A folder that transformers wrote, its table, its model and our parameters."""
  folder = tmp_path_factory.mktemp(request.param)
  is_decoder = request.param in tiny_decoders.KINDS
  model = (tiny_decoders.hf_decoder if is_decoder else tiny_encoders.hf_encoder)(request.param)
  model.save_pretrained(folder)
  _, params = (tiny_decoders.our_decoder if is_decoder else tiny_encoders.our_encoder)(folder)
  return folder, tables.TABLES[request.param], model, params


def test_saving_restores_every_tensor_and_transformers_computes_the_same(saved, tmp_path):
  folder, table, model, params = saved
  hf_folder.save_pretrained(params, tmp_path / "out", hf_config.read_config(folder), table)
  before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
  assert set(before) == set(after)
  weight_files.assert_equal(before, after)
  options = {"bert": {"add_pooling_layer": False}, "distilbert": {}}.get(table.name, {"attn_implementation": "eager"})
  again, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  tokens = torch.arange(20).reshape(2, 10)
  with torch.no_grad():
    wanted = model(tokens).last_hidden_state
    torch.testing.assert_close(again.eval()(tokens).last_hidden_state, wanted, rtol=0, atol=0)


def test_device_arrays_are_saved_like_numpy_arrays(written, tmp_path):
  folder, _ = written
  _, params = tiny_encoders.our_encoder(folder)
  settings = hf_config.read_config(folder)
  hf_folder.save_pretrained(jax.tree.map(jax.numpy.asarray, params), tmp_path, settings, tables.BERT)
  weight_files.assert_equal(load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors"))


def test_a_table_covers_every_parameter_once(saved):
  _, table, _, params = saved
  assert sorted(rule.ours for rule in table.rules) == sorted(engine.flatten_tree(params))


def test_loaded_parameters_fill_the_module(written):
  folder, _ = written
  model = merge_params(*tiny_encoders.our_encoder(folder))
  stored = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
  np.testing.assert_array_equal(model.word_embedding[...], stored)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_encoders_with_heads_load_by_their_prefix(kind, tmp_path):
  names = {"bert": "BertForPreTraining", "distilbert": "DistilBertForMaskedLM"}
  encoder = tiny_encoders.hf_encoder(kind)
  whole = getattr(transformers, names[kind])(encoder.config)
  getattr(whole, kind).load_state_dict(encoder.state_dict(), strict=False)
  encoder.save_pretrained(tmp_path / "encoder")
  whole.save_pretrained(tmp_path / "whole")
  assert any(name.startswith(f"{kind}.") for name in load_file(tmp_path / "whole/model.safetensors"))
  weight_files.assert_equal(*(tiny_encoders.our_encoder(tmp_path / name)[1] for name in ("encoder", "whole")))


@pytest.mark.parametrize("kind", tiny_decoders.KINDS)
def test_decoders_with_an_output_head_load_by_their_prefix(kind, tmp_path):
  names = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
  }
  decoder = tiny_decoders.hf_decoder(kind)
  whole = getattr(transformers, names[kind])(decoder.config)
  whole.model.load_state_dict(decoder.state_dict())
  decoder.save_pretrained(tmp_path / "decoder")
  whole.save_pretrained(tmp_path / "whole")
  names = set(load_file(tmp_path / "whole/model.safetensors"))
  assert "model.norm.weight" in names and whole.config.tie_word_embeddings == ("lm_head.weight" not in names)
  weight_files.assert_equal(*(tiny_decoders.our_decoder(tmp_path / name)[1] for name in ("decoder", "whole")))


@pytest.mark.parametrize("first", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_with_an_image_tower_is_loaded(first, tmp_path):
  decoder = tiny_decoders.hf_decoder("gemma3_text")
  decoder.save_pretrained(tmp_path / "decoder")
  tiny_decoders.with_image_tower(decoder).save_pretrained(tmp_path / "whole")
  tensors = load_file(tmp_path / "whole/model.safetensors")
  weight_files.write(
    tmp_path / "whole", {name.replace("language_model.model.", first): value for name, value in tensors.items()}
  )
  assert sum(name.startswith(first) for name in load_file(tmp_path / "whole/model.safetensors")) < len(tensors)
  assert hf_config.text_part(tmp_path / "whole") == "language_model" and hf_config.text_part(tmp_path / "decoder") == ""
  assert hf_config.encoder_arguments(tmp_path / "whole") == hf_config.encoder_arguments(tmp_path / "decoder")
  weight_files.assert_equal(*(tiny_decoders.our_decoder(tmp_path / name)[1] for name in ("decoder", "whole")))


def test_names_of_older_checkpoints_are_understood(bert):
  folder, tensors, shapes = bert
  wanted = weight_files.load(folder, shapes)
  weight_files.write(
    folder,
    {
      name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
      for name, value in tensors.items()
    },
  )
  weight_files.assert_equal(weight_files.load(folder, shapes), wanted)


def test_sharded_safetensors_load_like_one_file(bert, tmp_path):
  folder, _, shapes = bert
  model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
  model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 1
  weight_files.assert_equal(weight_files.load(tmp_path / "shards", shapes), weight_files.load(folder, shapes))
  next((tmp_path / "shards").glob("model-00001-*")).unlink()
  with pytest.raises(InputError, match=r"index\.json: lists model-00001-.* the folder does not have"):
    weight_files.load(tmp_path / "shards", shapes)


def test_a_tensor_in_two_shards_is_a_duplicate(bert):
  folder, tensors, shapes = bert
  name = "embeddings.LayerNorm.weight"
  save_file(tensors, folder / "model-00001-of-00002.safetensors")
  save_file({name: tensors[name]}, folder / "model-00002-of-00002.safetensors")
  (folder / "model.safetensors").unlink()
  index = {
    "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    | {name: "model-00002-of-00002.safetensors"}
  }
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match=rf"1 duplicate: {name}$"):
    weight_files.load(folder, shapes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_checkpoints_become_float32_parameters(bert, dtype):
  folder, tensors, shapes = bert
  wanted = weight_files.load(folder, shapes)
  weight_files.write(folder, {name: value.astype(dtype) for name, value in tensors.items()})
  found = weight_files.load(folder, shapes)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
  weight_files.assert_equal(found, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), wanted))


def test_parameters_have_the_requested_dtype(bert):
  folder, _, shapes = bert
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16), shapes)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(weight_files.load(folder, half))} == {"bfloat16"}


def test_quantized_tensors_raise_an_error(bert):
  folder, tensors, shapes = bert
  name = "embeddings.word_embeddings.weight"
  weight_files.write(folder, tensors | {name: tensors[name].astype(np.int8)})
  with pytest.raises(InputError, match=r"word_embeddings\.weight is int8"):
    weight_files.load(folder, shapes)


def test_pickled_weights_raise_an_error_that_says_how_to_convert_them(bert):
  folder, _, shapes = bert
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match=r"has only pickled weights .*save_pretrained"):
    weight_files.load(folder, shapes)


def test_damaged_or_missing_files_raise_an_error_that_names_them(bert):
  folder, _, shapes = bert
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(InputError, match=r"model\.safetensors: is not a complete safetensors file"):
    weight_files.load(folder, shapes)
  file.unlink()
  with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
    weight_files.load(folder, shapes)
  (folder / "model.safetensors.index.json").write_text("[1]")
  with pytest.raises(InputError, match="is not an index"):
    weight_files.load(folder, shapes)
