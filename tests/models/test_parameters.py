"""Modules split into parameters and axes, and merged again."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax.models.parameters import join_params, merge_params, split_params
from vixml_jax.models.transformer import PostNormLayer, stack_layers


def _make_stack():
  return stack_layers(lambda rngs: PostNormLayer(16, 2, 24, rngs=rngs), 3, nnx.Rngs(0))


def test_modules_are_split_into_dicts_and_merged_under_jit():
  graphdef, params, axes = split_params(_make_stack())
  assert params["up"]["kernel"].shape == (3, 16, 24)
  assert axes["up"]["kernel"] == ("layers", "embed", "mlp")
  assert axes["attention"]["query"]["kernel"] == ("layers", "embed", "heads", "head_dim")
  assert axes["attention"]["output"]["kernel"] == ("layers", "heads", "head_dim", "embed")
  assert jax.tree.map(lambda value, names: value.ndim == len(names), params, axes)
  double = jax.jit(lambda p: split_params(merge_params(graphdef, p))[1])(params)
  jax.tree.map(np.testing.assert_array_equal, double, params)


def test_abstract_modules_are_split_like_real_ones():
  graphdef, params, axes = split_params(_make_stack())
  abstract_graphdef, shapes, abstract_axes = split_params(nnx.eval_shape(_make_stack))
  assert abstract_axes == axes and abstract_graphdef == graphdef
  assert hash(abstract_graphdef) == hash(graphdef)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
  assert isinstance(merge_params(abstract_graphdef, shapes).up.kernel, nnx.Param)


@pytest.mark.parametrize("metadata", [{}, {"axes": ("embed",)}])
def test_a_parameter_without_one_axis_per_dimension_raises_an_error(metadata):
  class Bare(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.zeros((2, 3)), **metadata)

  with pytest.raises(ValueError, match="kernel has shape"):
    split_params(Bare())


def test_a_variable_that_is_no_parameter_raises_an_error():
  class Counter(nnx.Module):
    def __init__(self):
      self.count = nnx.Variable(jnp.zeros(()), axes=())

  with pytest.raises(ValueError, match="count is a Variable"):
    split_params(Counter())


def test_trees_that_share_no_leaf_are_joined():
  left, right = {"a": {"x": 1}, "b": 2}, {"a": {"y": {"z": 3}}}
  assert join_params(left, right) == {"a": {"x": 1, "y": {"z": 3}}, "b": 2}
  assert left == {"a": {"x": 1}, "b": 2}, "the arguments are unchanged"
