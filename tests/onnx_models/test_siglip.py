"""The graph of a SigLIP tower computes the features that transformers and the package compute."""

import jax
import numpy as np
import pytest
import torch

from tests.helpers import tiny_siglip
from vixml_jax.models.parameters import merge_params
from vixml_jax.onnx_models.session import new_session
from vixml_jax.onnx_models.siglip import siglip_model
from vixml_jax.weights.vision import load_tower

pytest.importorskip("onnx", reason="needs onnx: pip install -c constraints.txt -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -c constraints.txt -e '.[onnx]'")


def test_features_are_those_of_transformers_and_of_our_tower(tmp_path):
  theirs = tiny_siglip.hf_tower()
  theirs.save_pretrained(tmp_path)
  params, arguments = load_tower(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (5, 30, 30, 3)).astype(np.uint8)
  session = new_session(siglip_model(params, arguments).SerializeToString())
  (found,) = session.run(["features"], {"pixels": images})
  pixels = np.float32(images) / 255 * 2 - 1
  with torch.no_grad():
    wanted = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2))).pooler_output.numpy()
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)  # float16 has 11 bits.
  np.testing.assert_array_equal(found, found.astype(np.float16))
  ours = jax.jit(lambda params, pixels: merge_params(tiny_siglip.our_tower(), params)(pixels))(params, pixels)
  np.testing.assert_allclose(found, ours, rtol=1e-3, atol=1e-4)
  assert np.abs(found[0] - found[1]).max() > 0.01, "images have different features"
  assert session.run(["features"], {"pixels": images[:0]})[0].shape == (0, 24)
