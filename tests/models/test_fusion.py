"""Fusion of images and texts against transformers and torch; packed rows against single items."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import tiny_encoders
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.models.definition import define_model
from vixml_jax.models.fusion import ADAPTERS, ImageFusion, ImageTokens
from vixml_jax.ragged import Ragged
from vixml_jax.weights import hf_config

FEATURES, IMAGES = 12, 3
TEMPLATES = {"before": ("images", "text"), "after": ("text", "images"), "apart": ("text",)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
  """Kind -> transformers' encoder, and the arguments and parameters of ours."""
  found = {}
  for kind in ("bert", "distilbert"):
    theirs = tiny_encoders.hf_encoder(kind)
    folder = tmp_path_factory.mktemp(kind)
    theirs.save_pretrained(folder)
    _, params = tiny_encoders.our_encoder(folder)
    found[kind] = theirs, hf_config.encoder_arguments(folder), jax.tree.map(jnp.asarray, params)
  return found


@pytest.fixture(scope="module")
def bert(encoders):
  return encoders["bert"]


def model_of(encoder, fusion):
  """Our model with the encoder's weights and random values for all other parameters."""
  _, arguments, params = encoder
  definition = define_model(arguments, dict(num_heads=4, mlp_dim=16), 4, fusion)
  rng = np.random.default_rng(2)
  drawn = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), definition.shapes)
  return definition.bind(drawn | {"encoder": params})


def with_images(encoder, **fusion):
  return model_of(encoder, dict(feature_dim=FEATURES) | fusion)


def items(seed=0, count=9):
  rng = np.random.default_rng(seed)
  bank = rng.normal(size=(30, FEATURES)).astype(np.float16)
  tokens = Ragged.from_rows(tiny_encoders.texts(rng.integers(2, 9, count), seed))
  counts = np.array([0, 3, 1, 2, 0, 3, 3, 1, 2][:count])
  return Items(tokens, Ragged.from_rows([rng.integers(0, 30, n) for n in counts])), bank


@functools.lru_cache
def compiled(model, slots):
  """`model.pool` as a program, made once for each shape."""
  return jax.jit(lambda tokens, segments, positions, images: model.pool(tokens, segments, positions, slots, images))


def pooled(model, packed_items, bank, layout):
  """Pooled vectors of all items, in their order."""

  def merged(x):
    return jnp.asarray(x.reshape(-1, x.shape[-1]))

  images = packed_items.images
  tokens = ImageTokens(jnp.asarray(bank)[merged(images.rows)], merged(images.segments), merged(images.positions))
  out = compiled(model, layout.slots)(
    merged(packed_items.tokens), merged(packed_items.segments), merged(packed_items.positions), tokens
  )
  return np.asarray(out).reshape(-1, out.shape[-1])[packed_items.slots]


@pytest.mark.parametrize(
  "kind,adapter,order",
  [
    *(("bert", adapter, "before") for adapter in ADAPTERS),
    ("bert", "linear", "after"),
    ("distilbert", "linear", "before"),
  ],
)
def test_early_fusion_equals_transformers_with_images_among_its_input_embeddings(encoders, kind, adapter, order):
  theirs, _, _ = encoders[kind]
  model = with_images(encoders[kind], adapter=adapter)
  layout = PackedLayout(16, 4, IMAGES, TEMPLATES[order])
  queries, bank = items()
  ours = pooled(model, pack(queries, layout), bank, layout)

  def linear(name, x):
    module = getattr(model.fusion, name)
    return torch.nn.functional.linear(
      x, torch.tensor(np.asarray(module.kernel[...]).T), torch.tensor(np.asarray(module.bias[...]))
    )

  words = theirs.get_input_embeddings()
  for i in range(len(queries)):
    features = torch.tensor(bank[queries.images[i]].astype(np.float32).reshape(-1, FEATURES))
    tokens = linear("project", features)
    if adapter == "mlp":
      tokens = linear("hidden", torch.nn.functional.gelu(tokens))
    if adapter == "gated":
      tokens = tokens * torch.sigmoid(linear("gate", features))
    texts = words(torch.tensor(queries.tokens[i]).long())
    if adapter == "cross_attention":
      tokens = tokens + torch_attention(model.fusion.attention, tokens, texts)
    parts = [tokens, texts]
    embeddings = torch.cat(parts if order == "before" else parts[::-1])[None]
    with torch.no_grad():
      wanted = theirs(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2])).last_hidden_state[0]
    np.testing.assert_allclose(ours[i], wanted.mean(0).numpy(), atol=2e-5)


def torch_attention(ours, x, context):
  """The output of torch's attention with our parameters."""
  heads, _, dim = ours.output.kernel.shape
  theirs = torch.nn.MultiheadAttention(dim, heads, batch_first=True).eval()
  parts = [getattr(ours, name) for name in ("query", "key", "value")]
  value = lambda param: torch.tensor(np.asarray(param[...]))
  theirs.load_state_dict(
    {
      "in_proj_weight": torch.cat([value(part.kernel).reshape(dim, dim).T for part in parts]),
      "in_proj_bias": torch.cat([value(part.bias).reshape(dim) for part in parts]),
      "out_proj.weight": value(ours.output.kernel).reshape(dim, dim).T,
      "out_proj.bias": value(ours.output.bias),
    }
  )
  return theirs(x[None], context[None], context[None])[0][0]


def test_an_image_without_words_attends_to_nothing(bert):
  queries, bank = items()
  layout = PackedLayout(16, 4, IMAGES, ("images",))  # An item with images has no words.
  model = with_images(bert, adapter="cross_attention")
  found = pooled(model, pack(queries, layout), bank, layout)
  model.fusion.attention = None
  compiled.cache_clear()  # The module is its key.
  np.testing.assert_allclose(found, pooled(model, pack(queries, layout), bank, layout), atol=1e-6)


def test_late_fusion_is_the_mean_of_the_outputs_of_a_torch_layer(bert):
  _, arguments, _ = bert
  model = with_images(bert, method="late")
  layout = PackedLayout(16, 4, IMAGES, TEMPLATES["apart"])
  queries, bank = items()
  ours = pooled(model, pack(queries, layout), bank, layout)
  dim, heads = arguments["embed_dim"], arguments["num_heads"]
  theirs = torch.nn.TransformerEncoderLayer(
    dim, heads, arguments["mlp_dim"], activation="gelu", batch_first=True, layer_norm_eps=1e-12
  ).eval()
  mixer, value = model.fusion.mixer, lambda param: torch.tensor(np.asarray(param[...]))
  parts = [getattr(mixer.attention, name) for name in ("query", "key", "value")]
  theirs.load_state_dict(
    {
      "self_attn.in_proj_weight": torch.cat([value(part.kernel).reshape(dim, dim).T for part in parts]),
      "self_attn.in_proj_bias": torch.cat([value(part.bias).reshape(dim) for part in parts]),
      "self_attn.out_proj.weight": value(mixer.attention.output.kernel).reshape(dim, dim).T,
      "self_attn.out_proj.bias": value(mixer.attention.output.bias),
      "linear1.weight": value(mixer.up.kernel).T,
      "linear1.bias": value(mixer.up.bias),
      "linear2.weight": value(mixer.down.kernel).T,
      "linear2.bias": value(mixer.down.bias),
      "norm1.weight": value(mixer.attention_norm.scale),
      "norm1.bias": value(mixer.attention_norm.bias),
      "norm2.weight": value(mixer.mlp_norm.scale),
      "norm2.bias": value(mixer.mlp_norm.bias),
    }
  )
  texts = pooled(
    with_images(bert),
    pack(Items.of_texts(queries.tokens), PackedLayout(16, 4, IMAGES)),
    bank,
    PackedLayout(16, 4, IMAGES),
  )
  for i in range(len(queries)):
    features = bank[queries.images[i]].astype(np.float32).reshape(-1, FEATURES)
    tokens = features @ np.asarray(model.fusion.project.kernel[...]) + np.asarray(model.fusion.project.bias[...])
    with torch.no_grad():
      wanted = theirs(torch.tensor(np.concatenate([texts[i : i + 1], tokens]))[None])[0].mean(0)
    np.testing.assert_allclose(ours[i], wanted.numpy(), atol=2e-5)


def test_a_residual_adds_a_map_of_the_mean_features_to_items_with_images_only(bert):
  queries, bank = items()
  layout = PackedLayout(16, 4, IMAGES)
  model = with_images(bert, residual=True)
  kernel, bias = (np.asarray(param[...]) for param in (model.fusion.residual.kernel, model.fusion.residual.bias))
  found = pooled(model, pack(queries, layout), bank, layout)
  model.fusion.residual = None
  compiled.cache_clear()  # The module is its key.
  without = pooled(model, pack(queries, layout), bank, layout)
  for i in range(len(queries)):
    features = bank[queries.images[i]].astype(np.float32)
    added = (features.mean(0) @ kernel + bias) / np.sqrt(FEATURES) if len(features) else np.zeros(len(bias))
    np.testing.assert_allclose(found[i] - without[i], added, atol=1e-5)
  assert (found == without).all(1).sum() == (queries.images.lengths == 0).sum() > 0


def test_an_item_without_images_has_the_vector_of_a_model_of_texts_only(bert):
  queries, bank = items()
  texts = Items.of_texts(queries.tokens)
  layout = PackedLayout(16, 4, IMAGES)
  with_slots = pooled(with_images(bert), pack(texts, layout), bank, layout)
  text_layout = PackedLayout(16, 4)
  rows = pack(texts, text_layout)
  out = model_of(bert, None).pool(
    *(jnp.asarray(x.reshape(-1, 16)) for x in (rows.tokens, rows.segments, rows.positions)), text_layout.slots
  )
  np.testing.assert_allclose(with_slots, np.asarray(out).reshape(-1, out.shape[-1])[rows.slots], atol=1e-6)


@pytest.mark.parametrize(
  "fusion,order",
  [
    (dict(method="early"), "before"),
    (dict(method="early"), "after"),
    (dict(adapter="cross_attention"), "after"),
    (dict(method="late"), "apart"),
  ],
)
def test_items_of_a_row_are_independent_and_empty_places_get_no_gradient(bert, fusion, order):
  model = with_images(bert, **fusion)
  layout = PackedLayout(24, 2, IMAGES, TEMPLATES[order])
  queries, bank = items()
  together = pooled(model, pack(queries, layout), bank, layout)
  for i in range(len(queries)):
    alone = pooled(model, pack(queries.take(np.array([i])), layout), bank, layout)
    np.testing.assert_allclose(together[i], alone[0], atol=2e-5)
  packed = pack(queries, layout)

  def total(features):
    def merged(x):
      return jnp.asarray(x.reshape(-1, x.shape[-1]))

    images = ImageTokens(features, merged(packed.images.segments), merged(packed.images.positions))
    out = model.pool(merged(packed.tokens), merged(packed.segments), merged(packed.positions), layout.slots, images)
    return (out.reshape(-1, out.shape[-1])[packed.slots] ** 2).sum()

  features = jnp.asarray(bank[packed.images.rows].astype(np.float32).reshape(-1, layout.image_places, FEATURES))
  gradient = np.abs(np.asarray(jax.jit(jax.grad(total))(features))).sum(-1)
  filled = packed.images.segments.reshape(-1, layout.image_places) > 0
  assert (gradient[filled] > 0).all() and (gradient[~filled] == 0).all()


def test_a_model_with_fusion_but_no_images_raises_an_error(bert):
  model = with_images(bert)
  row = jnp.ones((1, 8), jnp.int32)
  with pytest.raises(ValueError, match="images must be given if and only if"):
    model.pool(row, row, row, 2)


@pytest.mark.parametrize("early", [dict(residual=True), dict(adapter="cross_attention")])
def test_a_part_of_early_fusion_with_late_fusion_raises_an_error(bert, early):
  with pytest.raises(ValueError, match="requires early fusion"):
    with_images(bert, method="late", **early)


@pytest.mark.parametrize("unknown", [dict(method="middle"), dict(adapter="conv")])
def test_an_unknown_method_or_adapter_raises_an_error(bert, unknown):
  with pytest.raises(ValueError, match=next(iter(unknown.values()))):
    with_images(bert, **unknown)


def test_the_image_projection_starts_like_a_linear_layer_of_torch():
  torch.manual_seed(0)
  theirs = torch.nn.Linear(400, 300)
  ours = ImageFusion(400, 300, 4, 8, rngs=nnx.Rngs(0)).project
  for name, wanted in (("kernel", theirs.weight), ("bias", theirs.bias)):
    value, wanted = np.asarray(getattr(ours, name)[...]), wanted.detach().numpy()
    np.testing.assert_allclose(value.std(), wanted.std(), rtol=0.15, err_msg=name)
    np.testing.assert_allclose(np.abs(value).max(), 1 / np.sqrt(400), rtol=0.03, err_msg=name)
