"""Graphs of BERT and DistilBERT encoders compute the same as ours and as transformers; in int8 nearly the same."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from tests.helpers import tiny_encoders
from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import ItemEncoder, normalize
from vixml_jax.errors import InputError
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, Phrase, whole_items, without_images
from vixml_jax.models.definition import define_model
from vixml_jax.onnx_models import libraries, quantization
from vixml_jax.onnx_models.bert import bert_model
from vixml_jax.onnx_models.calibration import largest_outputs, random_items
from vixml_jax.onnx_models.quantization import int8_model
from vixml_jax.onnx_models.session import OnnxEncoder, batches, inputs_of, new_session
from vixml_jax.ragged import Ragged
from vixml_jax.weights import hf_config

pytest.importorskip("onnx", reason="needs onnx: pip install -c constraints.txt -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -c constraints.txt -e '.[onnx]'")

FEATURES = 6
SIZES = dict(
  vocab_size=tiny_encoders.VOCAB,
  num_layers=tiny_encoders.LAYERS,
  embed_dim=tiny_encoders.DIM,
  num_heads=tiny_encoders.HEADS,
  mlp_dim=tiny_encoders.MLP,
  max_position=tiny_encoders.POSITIONS,
  layer_norm_eps=1e-12,
)
KINDS = {
  "bert": (2, None),
  "distilbert": (0, None),
  "images": (2, dict(adapter="linear", residual=True)),
  "gated": (2, dict(adapter="gated", residual=False)),
  "cross-attention": (2, dict(adapter="cross_attention", residual=True)),
  "mlp": (0, dict(adapter="mlp", residual=True)),
  "late": (2, dict(adapter="linear", method="late")),
  "late gated": (0, dict(adapter="gated", method="late")),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny model with random parameters, items, and what our encoder computes for them before normalization."""

  params: dict
  arguments: dict
  layout: PackedLayout
  items: Items
  features: np.ndarray | None
  pooled: np.ndarray

  @property
  def examples(self):
    """Items of random tokens."""
    return random_items(SIZES["vocab_size"], [2, 3], 16, self.layout)

  def run(self, model):
    """Returns what an ONNX model computes."""
    return OnnxEncoder(model).pooled(whole_items(self.items, self.layout), self.features)


@pytest.fixture(scope="module", params=KINDS)
def case(request):
  token_types, adapter = KINDS[request.param]
  fusion = adapter and dict(method="early") | adapter | dict(feature_dim=FEATURES)
  definition = define_model(SIZES | dict(num_token_types=token_types), dict(num_heads=4, mlp_dim=32), 8, fusion)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return 1 + 0.1 * noise if path[-1].key == "scale" else 0.2 * noise

  params = jax.tree_util.tree_map_with_path(draw, definition.shapes)
  lengths, counts = rng.integers(2, 14, 30), rng.integers(0, 4, 30) if fusion else np.zeros(30, np.int64)
  texts = Ragged.of_lengths(rng.integers(1, SIZES["vocab_size"], lengths.sum()).astype(np.int32), lengths)
  items = Items(texts, Ragged.of_lengths(rng.permutation(counts.sum()).astype(np.int32), counts))
  features = rng.normal(size=(counts.sum(), FEATURES)).astype(np.float16) if fusion else None
  parts = (Phrase((7,), for_images=True), "images", "text", Phrase((5, 6))) if fusion else ("text",)
  if fusion and fusion["method"] == "late":
    parts = without_images(parts)
  layout = PackedLayout(24, 4, images=3 if fusion else 0, template=parts)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  encoder = ItemEncoder(definition, layout, mesh, None if features is None else ImageFeatures(features))
  # The encoder reads the images of an item by their rows; the ONNX model gets them item by item.
  ordered = None if features is None else features[items.images.values]
  arguments = definition.arguments["encoder"]
  return Case(params, arguments, layout, items, ordered, encoder.pooled(params, items))


def test_the_graph_computes_what_our_encoder_does(case):
  model = bert_model(case.params, case.arguments).SerializeToString()
  np.testing.assert_allclose(case.run(model), case.pooled, atol=1e-5)


def test_a_graph_that_is_balanced_for_int8_computes_the_same(case):
  largest = largest_outputs(bert_model({"encoder": case.params["encoder"]}, case.arguments), case.examples)
  model = bert_model(case.params, case.arguments, largest)
  np.testing.assert_allclose(case.run(model.SerializeToString()), case.pooled, atol=1e-5)


@pytest.mark.parametrize("cpu", ["x86 avx512_vnni", "x86 avx2"])
def test_int8_is_near_on_every_cpu(case, cpu, monkeypatch):
  bits = 8 if "vnni" in cpu else 7
  if bits > quantization.weight_bits():
    pytest.skip("products of 8 bits overflow on this CPU")
  monkeypatch.setattr(quantization, "weight_bits", lambda: bits)
  found = case.run(int8_model(case.params, case.arguments, case.examples))
  cosines = np.sum(normalize(found) * normalize(case.pooled), axis=1)
  assert cosines.min() > 0.98 and cosines.max() < 1 - 1e-7


@pytest.mark.parametrize("case", ["bert"], indirect=True)
def test_large_outputs_in_few_dimensions_do_not_decide_the_range_of_all(case, monkeypatch):
  # Trained encoders have such dimensions, in every text: the first layer's norms multiply two of them here.
  params = jax.tree.map(np.copy, case.params)
  params["encoder"]["layers"]["attention_norm"]["scale"][:, [3, 11]] *= 60
  params["encoder"]["layers"]["up"]["kernel"][:, [3, 11]] /= 60
  wanted = normalize(case.run(bert_model(params, case.arguments).SerializeToString()))

  def error():
    found = case.run(int8_model(params, case.arguments, case.examples))
    return 1 - np.sum(normalize(found) * wanted, axis=1).mean()

  balanced = error()
  monkeypatch.setattr(quantization, "bert_model", lambda params, arguments, _=None: bert_model(params, arguments))
  assert balanced < 0.5 * error()


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_graph_computes_the_hidden_states_of_transformers(kind, tmp_path):
  model = tiny_encoders.hf_encoder(kind)
  model.save_pretrained(tmp_path)
  graph = bert_model({"encoder": tiny_encoders.our_encoder(tmp_path)[1]}, hf_config.encoder_arguments(tmp_path))
  tokens, mask = tiny_encoders.padded(tiny_encoders.texts([5, 9, 2]))
  with torch.no_grad():
    hidden = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
  wanted = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  found = new_session(graph.SerializeToString()).run(
    ["pooled", "embeddings"], {"input_ids": tokens.astype(np.int64), "attention_mask": mask.astype(np.int64)}
  )
  np.testing.assert_allclose(found[0], wanted, atol=1e-5)
  np.testing.assert_allclose(found[1], normalize(wanted), atol=1e-5)


def test_items_without_tokens_and_no_items_have_outputs():
  sizes = SIZES | dict(num_token_types=0)
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), define_model(sizes, {"num_heads": 4}, 8).shapes)
  encoder = OnnxEncoder(bert_model(params, sizes).SerializeToString())
  layout = PackedLayout(24, 4, template=("text",))
  found = encoder.pooled(whole_items(Items.of_texts(Ragged.from_rows([[], [4, 5]])), layout))
  assert not found[0].any() and found[1].any()
  assert encoder.pooled(whole_items(Items.of_texts(Ragged.from_rows([])), layout)).shape == (0, SIZES["embed_dim"])


def test_batches_contain_every_item_once_and_little_padding():
  lengths = np.random.default_rng(0).integers(0, 33, 500)
  found = batches(lengths, cores=2)
  np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(500))
  padded = sum(len(rows) * lengths[rows].max() for rows in found)
  assert padded < 1.1 * lengths.sum()
  assert max(len(rows) * lengths[rows].max() for rows in found) <= 1024
  assert len(batches(np.array([7, 7]), cores=2)) == 2, "two cores share two items"


def test_inputs_are_padded_on_the_right():
  items = whole_items(
    Items(Ragged.from_rows([[11, 12], [21, 22, 23]]), Ragged.from_rows([[], [0, 1]])),
    PackedLayout(8, 1, images=2, template=("text", "images")),
  )
  found = inputs_of(items, np.array([1, 0]), np.array([[1.5], [2.5]]))
  assert found["input_ids"].tolist() == [[21, 22, 23, 0, 0], [11, 12, 0, 0, 0]]
  assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
  assert found["image_features"].tolist() == [[1.5], [2.5]] and found["image_places"].tolist() == [[0, 3], [0, 4]]


@pytest.mark.parametrize(
  "machine,flags,bits", [("x86_64", "avx2 avx_vnni", 8), ("x86_64", "avx2", 7), ("aarch64", "asimddp", 8)]
)
def test_weights_have_7_bits_where_products_could_overflow(machine, flags, bits, monkeypatch):
  monkeypatch.setattr(quantization.platform, "machine", lambda: machine)
  monkeypatch.setattr(quantization.Path, "read_text", lambda *_, **__: f"flags : {flags}")
  assert quantization.weight_bits() == bits


def test_an_absent_library_is_one_line_with_the_command_that_installs_it():
  with pytest.raises(InputError, match=r"need the package no_onnx, .*: pip install .*\[onnx\]") as caught:
    libraries.import_library("no_onnx.helper")
  assert "\n" not in str(caught.value)
