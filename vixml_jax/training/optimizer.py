"""AdamW with parameter groups by rule, linear warm-up and linear decay."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vixml_jax.errors import InputError

# Pattern of a parameter's path -> (which learning rate, whether weight decay applies). Every parameter
# matches exactly one rule. The prototype layer's norm scales are decayed, as in the published code.
RULES: tuple[tuple[str, tuple[str, bool]], ...] = (
  (r"encoder/.*/bias", ("encoder", False)),
  (r"encoder/.*norm/scale", ("encoder", False)),
  (r"encoder/.*(/kernel|_embedding|/lora_[ab])", ("encoder", True)),
  (r"prototype/.*/bias", ("new", False)),
  (r"prototype/.*(/kernel|norm/scale)", ("new", True)),
  (r"free_vectors", ("free_vectors", False)),
  (r"fusion/.*/bias", ("new", False)),
  (r"fusion/.*(/kernel|norm/scale)", ("new", True)),
)


def path_name(path: tuple[Any, ...]) -> str:
  """`encoder/layers/up/kernel` of a jax key path."""
  return "/".join(str(part.key) for part in path)


def parameter_groups(params: Any, rules: tuple = RULES) -> Any:
  """For every parameter its (learning rate name, decayed) pair.

  Raises:
    ValueError: if no rule, or more than one, matches a parameter.
  """

  def group(path, _):
    name = path_name(path)
    found = [value for pattern, value in rules if re.fullmatch(pattern, name)]
    if len(found) != 1:
      raise ValueError(f"{name}: {len(found)} optimizer rules match, one must")
    return found[0]

  return jax.tree_util.tree_map_with_path(group, params)


def schedule(warmup_steps: int, total_steps: int) -> optax.Schedule:
  """Factor on the learning rate: 0 at step 0, 1 at `warmup_steps`, 0 at `total_steps`, linear between."""
  if not warmup_steps >= 0:
    raise InputError(f"train.warmup_steps={warmup_steps}: must not be negative")

  def factor(step):
    step = jnp.asarray(step, jnp.float32)
    rising = step / max(warmup_steps, 1)
    falling = (total_steps - step) / max(total_steps - warmup_steps, 1)
    return jnp.where(step < warmup_steps, rising, jnp.maximum(falling, 0.0))

  return factor


def make_optimizer(
  params: Any,
  *,
  learning_rate: float,
  new_learning_rate: float,
  free_vector_learning_rate: float,
  warmup_steps: int,
  total_steps: int,
  weight_decay: float = 0.01,
  adam_eps: float = 1e-6,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """AdamW (METHOD "Recipe").

  Args:
    params: tree of what is trained, parameters or shapes; only its paths are used.
    learning_rate: peak rate of the pretrained encoder, or of its adapters.
    new_learning_rate: peak rate of what starts from scratch: image fusion and prototype network.
    free_vector_learning_rate: peak rate of the free vectors.
    warmup_steps: steps of linear warm-up.
    total_steps: steps of the whole run.
    weight_decay: decoupled; not on biases, the encoder's norm scales or free vectors.
    adam_eps: added to the root of the second moment.
    clip_norm: global gradient norm; None for no clipping.
  """
  groups = parameter_groups(params)
  is_group = lambda node: isinstance(node, tuple)
  rates = {"encoder": learning_rate, "new": new_learning_rate, "free_vectors": free_vector_learning_rate}
  decayed = jax.tree.map(lambda group: group[1], groups, is_leaf=is_group)
  leaf_rates = jax.tree.map(lambda group: rates[group[0]], groups, is_leaf=is_group)
  scale_leaves = optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: -rate * u, updates, leaf_rates))
  steps = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  steps += [
    optax.scale_by_adam(eps=adam_eps),
    optax.add_decayed_weights(weight_decay, mask=decayed),
    scale_leaves,
    optax.scale_by_schedule(schedule(warmup_steps, total_steps)),
  ]
  return optax.chain(*steps)
