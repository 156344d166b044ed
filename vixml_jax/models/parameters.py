"""Parameters of a module as nested dicts of arrays: takes modules apart, puts them together, joins two trees.

`unstack_layers` is for programs without a loop over layers.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from vixml_jax.typing import Tree


def split_params(module: nnx.Module) -> tuple[nnx.GraphDef[Any], Tree, Tree]:
  """Splits a module into its structure, its parameters and their logical axes.

  Args:
    module: Module whose variables are all `nnx.Param(value, axes=...)`. The values may be arrays, tracers or
      `jax.ShapeDtypeStruct` (from `nnx.eval_shape`).

  Returns:
    `(graphdef, params, axes)`: the structure that `merge_params` needs, a nested dict of arrays, and a nested dict with
    the same keys that holds one axis name per dimension for each array.

  Raises:
    ValueError: If a variable is not a Param, or if its axes do not match its dimensions.
  """
  graphdef, state = nnx.split(module)
  params: Tree = {}
  axes: Tree = {}
  for path, variable in nnx.to_flat_state(state):
    name = "/".join(map(str, path))
    if not isinstance(variable, nnx.Param):
      raise ValueError(f"{name} is a {type(variable).__name__}; the variables of a model must be nnx.Param")
    value = variable.get_value()
    names = variable.get_metadata().get("axes")
    if names is None or len(names) != len(value.shape):
      raise ValueError(f"{name} has shape {value.shape} and axes {names}; give one axis name per dimension")
    _set_nested(params, path, value)
    _set_nested(axes, path, tuple(names))
  return graphdef, params, axes


def merge_params(graphdef: nnx.GraphDef[Any], params: Tree) -> Any:
  """Returns the module that `split_params` split, with these parameters; can be called under jit."""
  return nnx.merge(graphdef, params)


def join_params(left: Tree, right: Tree) -> Tree:
  """Returns the union of two nested dicts that share no leaf, such as those that `lora.split_lora` returns.

  >>> join_params({"encoder": {"kernel": 1}}, {"encoder": {"lora_a": 2}, "free_vectors": 3})
  {'encoder': {'kernel': 1, 'lora_a': 2}, 'free_vectors': 3}
  """
  joined = left | right
  for name in left.keys() & right.keys():
    joined[name] = join_params(left[name], right[name])
  return joined


def unstack_layers(params: Tree, axes: Tree) -> Tree:
  """Returns the parameters with those of stacked layers as tuples, an array for each layer.

  Args:
    params: Nested dict of arrays.
    axes: Nested dict with the same keys and a tuple of logical axes for each array.
  """
  return {
    name: unstack_layers(value, axes[name])
    if isinstance(value, dict)
    else tuple(value)
    if axes[name][:1] == ("layers",)
    else value
    for name, value in params.items()
  }


def restack_layers(params: Tree) -> Tree:
  """Returns what `unstack_layers` was called with; can be called under jit.

  A program that is not a loop over layers then reads the arrays of each layer, since XLA removes the stack.
  """
  return jax.tree.map(
    lambda leaf: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf,
    params,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def _set_nested(tree: Tree, path: tuple[Any, ...], value: Any) -> None:
  for part in path[:-1]:
    tree = tree.setdefault(part, {})
  tree[path[-1]] = value
