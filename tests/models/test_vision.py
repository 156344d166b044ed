"""The SigLIP vision tower against transformers, layer by layer; its patches, precision, initial values and sizes."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import tiny_encoders, tiny_siglip
from vixml_jax import sharding
from vixml_jax.models.parameters import merge_params, split_params
from vixml_jax.models.vision import VisionTransformer, define_vision
from vixml_jax.weights import engine, siglip, tables, vision


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
  """Model of transformers and parameters of ours."""
  folder = tmp_path_factory.mktemp("siglip")
  theirs = tiny_siglip.hf_tower()
  theirs.save_pretrained(folder)
  return theirs, vision.load_tower(folder)[0]


def _features(params, pixels, **changes):
  graphdef = tiny_siglip.our_tower(**changes)
  return jax.jit(lambda params, pixels: merge_params(graphdef, params)(pixels))(params, pixels)


def test_features_and_every_layer_equal_those_of_transformers(tower):
  theirs, params = tower
  pixels = tiny_siglip.pixels()
  with torch.no_grad():
    wanted = theirs(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True)

  @jax.jit
  def run(params, pixels):
    ours = merge_params(tiny_siglip.our_tower(), params)
    hidden = ours.encode_layers(ours.embed(pixels))
    return hidden, ours.final_norm(ours.encode(hidden[0])), ours(pixels)

  hidden, tokens, pooled = run(params, pixels)
  assert len(hidden) == len(wanted.hidden_states) == 4
  for ours_layer, their_layer in zip(hidden, wanted.hidden_states, strict=True):
    np.testing.assert_allclose(ours_layer, their_layer, atol=1e-5, rtol=0)
  np.testing.assert_allclose(tokens, wanted.last_hidden_state, atol=1e-5, rtol=0)
  assert pooled.shape == (2, 24) and pooled.dtype == jnp.float32
  np.testing.assert_allclose(pooled, wanted.pooler_output, atol=1e-5, rtol=0)
  assert np.abs(np.linalg.norm(pooled, axis=-1) - 1).min() > 0.1  # Not normalized.


def test_gradients_equal_those_of_torch_with_recomputed_activations(tower):
  theirs, params = tower
  pixels = jnp.asarray(tiny_siglip.pixels())
  weights = np.random.default_rng(1).normal(size=(2, 24)).astype(np.float32)
  theirs.zero_grad()
  (theirs(torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2)).pooler_output * torch.tensor(weights)).sum().backward()
  wanted = engine.flatten_tree(engine.apply(tables.SIGLIP, tiny_encoders.Gradients(theirs), params))

  def loss(params):
    return (merge_params(tiny_siglip.our_tower(remat=True), params)(pixels) * weights).sum()

  found = engine.flatten_tree(jax.jit(jax.grad(loss))(params))
  for name, gradient in wanted.items():
    scale = max(np.abs(gradient).max(), 0.1)  # The gradient of the keys' biases is zero except for rounding.
    np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_pixels_beyond_the_last_whole_patch_are_ignored(tower):
  _, params = tower
  pixels = tiny_siglip.pixels()
  beyond, within = pixels.copy(), pixels.copy()
  beyond[:, 24:] = beyond[:, :, 24:] = 1
  within[:, 23, 23] = 1
  plain, same, other = (np.asarray(_features(params, x)) for x in (pixels, beyond, within))
  np.testing.assert_array_equal(plain, same)
  assert np.abs(plain - other).max() > 1e-3
  np.testing.assert_array_equal(plain, _features(params, np.ascontiguousarray(pixels[:, :24, :24]), image_size=24))


@pytest.mark.parametrize("height,width", [(32, 30), (30, 32), (23, 24), (60, 60)])
def test_images_of_another_grid_raise_an_error_with_both_grids(tower, height, width):
  _, params = tower
  message = f"{height} x {width} pixels have {height // 8} x {width // 8} patches .* positions for 3 x 3"
  with pytest.raises(ValueError, match=message):
    _features(params, jnp.zeros((1, height, width, 3)))


def test_bfloat16_is_near_float32_and_returned_as_float32(tower):
  _, params = tower
  pixels = tiny_siglip.pixels(8)
  f32, bf16 = _features(params, pixels), _features(params, pixels, dtype="bfloat16")
  assert bf16.dtype == jnp.float32
  assert np.abs(f32 - bf16).max() > 1e-4  # The computation is in bfloat16.
  cosine = (f32 * bf16).sum(-1) / (jnp.linalg.norm(f32, axis=-1) * jnp.linalg.norm(bf16, axis=-1))
  assert cosine.min() > 0.999


def test_initial_values_are_distributed_as_in_big_vision():
  arguments = {"image_size": 64, "patch_size": 8, "num_layers": 2, "embed_dim": 64, "num_heads": 4, "mlp_dim": 128}
  init = jax.jit(lambda: split_params(VisionTransformer(**arguments, rngs=nnx.Rngs(0)))[1])
  flat = engine.flatten_tree(init())
  # flax.linen's lecun_normal for the patches, 1 / sqrt(width) for positions, else xavier_uniform.
  for name, deviation in {
    "patch_embedding/kernel": 1 / math.sqrt(8 * 8 * 3),
    "position_embedding": 1 / math.sqrt(64),
    "layers/attention/query/kernel": math.sqrt(2 / 128),
    "layers/attention/output/kernel": math.sqrt(2 / 128),
    "layers/up/kernel": math.sqrt(2 / 192),
    "head/attention/value/kernel": math.sqrt(2 / 128),
    "head/down/kernel": math.sqrt(2 / 192),
  }.items():
    assert np.std(flat[name]) == pytest.approx(deviation, rel=0.05), name
  assert np.abs(flat["head/probe"]).max() <= math.sqrt(6 / 65) < 1.1 * np.abs(flat["head/probe"]).max()
  first, second = flat["layers/up/kernel"]
  assert not np.allclose(first, second)


# Shapes of big_vision's checkpoint, in the order of our axes; those of a layer without the 27 layers.
_SO400M = {
  "patch_embedding/kernel": (14, 14, 3, 1152),
  "patch_embedding/bias": (1152,),
  "position_embedding": (729, 1152),
  "final_norm/scale": (1152,),
  "final_norm/bias": (1152,),
  "head/probe": (1152,),
}
_SO400M_BLOCK = {
  **{f"attention/{name}/kernel": (1152, 16, 72) for name in ("query", "key", "value")},
  **{f"attention/{name}/bias": (16, 72) for name in ("query", "key", "value")},
  "attention/output/kernel": (16, 72, 1152),
  "attention/output/bias": (1152,),
  "mlp_norm/scale": (1152,),
  "mlp_norm/bias": (1152,),
  "up/kernel": (1152, 4304),
  "up/bias": (4304,),
  "down/kernel": (4304, 1152),
  "down/bias": (1152,),
}


def test_so400m_at_384_has_the_published_shapes():
  wanted = (
    _SO400M
    | {f"head/{name}": shape for name, shape in _SO400M_BLOCK.items()}
    | {
      f"layers/{name}": (27, *shape)
      for name, shape in (_SO400M_BLOCK | {"attention_norm/scale": (1152,), "attention_norm/bias": (1152,)}).items()
    }
  )
  _, shapes, _ = define_vision(siglip.siglip_arguments("siglip2_so400m14_384"))
  found = engine.flatten_tree(shapes)
  assert {name: leaf.shape for name, leaf in found.items()} == wanted
  assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in found.values())  # Nothing is allocated.
  assert round(sum(math.prod(leaf.shape) for leaf in found.values()) / 1e6, 2) == 428.23


# Millions of parameters of the towers that timm publishes under vit_*_siglip_* with attention pooling.
_MILLIONS = {
  "b32_256": 94.55,
  "b16_224": 92.88,
  "b16_256": 92.93,
  "b16_384": 93.18,
  "b16_512": 93.52,
  "l16_256": 315.96,
  "l16_384": 316.28,
  "l16_512": 316.74,
  "so400m14_224": 427.68,
  "so400m14_384": 428.23,
  "so400m16_256": 427.89,
  "so400m16_384": 428.26,
  "so400m16_512": 428.77,
  "g-opt16_256": 1163.17,
  "g-opt16_384": 1163.66,
}


@pytest.mark.parametrize("variant", siglip.VARIANTS)
def test_every_variant_has_its_published_size_and_can_be_sharded(variant):
  arguments = siglip.siglip_arguments(variant)
  _, shapes, axes = define_vision(arguments)
  millions = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6
  assert round(millions, 2) == _MILLIONS[variant.partition("_")[2]]
  found = sharding.tree_shardings(sharding.make_mesh(data=2, fsdp=2, tensor=2), shapes, axes)
  kernel = shapes["layers"]["up"]["kernel"].shape
  assert found["layers"]["up"]["kernel"].shard_shape(kernel) == (kernel[0], kernel[1] // 2, kernel[2] // 2)
  assert variant.endswith(f"_{arguments['image_size']}")
  assert siglip.VARIANTS[variant].endswith(f"-patch{arguments['patch_size']}-{arguments['image_size']}")
