"""Loads and writes the weights of a small Hugging Face folder, and compares trees of them."""

import jax
import numpy as np
from safetensors.numpy import save_file

from vixml_jax.weights import hf_folder, tables


def load(folder, shapes, table=tables.BERT):
  return hf_folder.load_pretrained(folder, table, shapes)


def write(folder, tensors):
  save_file(tensors, folder / "model.safetensors")


def assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)
