"""Tables of weights: unmapped tensors, unfilled parameters, duplicates and wrong shapes are errors."""

import jax
import numpy as np
import pytest

from tests.helpers import weight_files
from vixml_jax.errors import InputError
from vixml_jax.weights import hf_config, hf_folder, tables


def test_unmapped_tensors_are_listed(bert):
  folder, tensors, shapes = bert
  weight_files.write(folder, tensors | {"encoder.gate.weight": np.zeros((2, 2), np.float32)})
  with pytest.raises(InputError, match=r"1 unmapped: \+encoder\.gate\.weight$"):
    weight_files.load(folder, shapes)


def test_a_deeper_checkpoint_than_the_model_is_unmapped_and_counted(bert):
  folder, tensors, shapes = bert
  layer = {k.replace("layer.2.", "layer.3."): v for k, v in tensors.items() if "layer.2." in k}
  weight_files.write(folder, tensors | layer)
  with pytest.raises(InputError, match=r"16 unmapped: \+encoder\.layer\.3\.") as error:
    weight_files.load(folder, shapes)
  assert str(error.value).count("+") == 10 and str(error.value).endswith(", ...")
  assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_unfilled_parameters_are_listed(bert):
  folder, tensors, shapes = bert
  del tensors["encoder.layer.1.output.dense.bias"]
  weight_files.write(folder, tensors)
  with pytest.raises(InputError, match=r"1 unfilled: -layers/down/bias \(from encoder\.layer\.1\.output"):
    weight_files.load(folder, shapes)


def test_parameters_that_no_rule_fills_are_listed(bert):
  folder, _, shapes = bert
  shapes["adapter"] = {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}
  with pytest.raises(InputError, match=r"1 unfilled: -adapter/kernel$"):
    weight_files.load(folder, shapes)


def test_a_renamed_tensor_is_both_unmapped_and_unfilled(bert):
  folder, tensors, shapes = bert
  tensors["encoder.layer.1.mlp.bias"] = tensors.pop("encoder.layer.1.output.dense.bias")
  weight_files.write(folder, tensors)
  with pytest.raises(InputError, match=r"\+encoder\.layer\.1\.mlp\.bias; 1 unfilled: -layers/down/bias"):
    weight_files.load(folder, shapes)


def test_a_tensor_with_and_without_prefix_is_a_duplicate(bert):
  folder, tensors, shapes = bert
  name = "embeddings.LayerNorm.weight"
  weight_files.write(folder, tensors | {f"bert.{name}": tensors[name]})
  with pytest.raises(InputError, match=r"1 duplicate: .*embeddings\.LayerNorm\.weight$"):
    weight_files.load(folder, shapes)


def test_two_rules_for_one_parameter_are_a_duplicate(bert):
  folder, _, shapes = bert
  table = tables.Table("bert", (*tables.BERT.rules, tables.BERT.rules[0]), tables.BERT.ignored)
  with pytest.raises(InputError, match=r"2 duplicate: embeddings\.word_embeddings\.weight, word_embedding$"):
    weight_files.load(folder, shapes, table)


def test_a_wrong_shape_is_listed_with_both_shapes(bert):
  folder, tensors, shapes = bert
  tensors["embeddings.word_embeddings.weight"] = np.zeros((51, 32), np.float32)
  weight_files.write(folder, tensors)
  with pytest.raises(
    InputError, match=(r"1 wrong shape: embeddings\.word_embeddings\.weight is \[51, 32\], expected \[50, 32\]$")
  ):
    weight_files.load(folder, shapes)


def test_a_transposed_matrix_is_a_wrong_shape(bert):
  folder, tensors, shapes = bert
  name = "encoder.layer.0.intermediate.dense.weight"
  tensors[name] = np.ascontiguousarray(tensors[name].T)
  weight_files.write(folder, tensors)
  with pytest.raises(InputError, match=r"wrong shape: .*is \[32, 48\], expected \[48, 32\]"):
    weight_files.load(folder, shapes)


def test_saving_parameters_that_do_not_fit_the_table_raises_an_error(bert, tmp_path):
  folder, _, shapes = bert
  params = weight_files.load(folder, shapes)
  params["lora"] = np.zeros(3)
  del params["token_type_embedding"]
  with pytest.raises(InputError, match=r"1 unmapped: \+lora; 1 unfilled: -token_type_embedding$"):
    hf_folder.save_pretrained(params, tmp_path / "out", hf_config.read_config(folder), tables.BERT)
  with pytest.raises(InputError, match="model_type is 'bert'"):
    hf_folder.save_pretrained(params, tmp_path / "out", hf_config.read_config(folder), tables.DISTILBERT)


def test_a_layout_that_does_not_fit_its_parameter_is_not_reported_as_bad_input(bert):
  folder, _, shapes = bert
  rules = (tables.Rule("word_embedding", "embeddings.word_embeddings.weight", "(h k) d -> d h k"),)
  with pytest.raises(ValueError, match="layout") as error:
    weight_files.load(folder, shapes, tables.Table("bert", rules, {}))
  assert not isinstance(error.value, InputError)
