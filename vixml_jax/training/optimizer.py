"""AdamW with parameter groups by rule, linear warm-up and linear decay."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from vixml_jax.errors import InputError
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.typing import Array, Tree

Rules = tuple[tuple[str, tuple[str, bool]], ...]
# Pattern of a parameter's path -> (name of its learning rate, whether weight decay applies). Every parameter matches
# exactly one rule. The norm scales of the prototype layer are decayed, as in the published code.
RULES: Rules = (
  (r"encoder/.*/bias", ("encoder", False)),
  (r"encoder/.*norm/scale", ("encoder", False)),
  (r"encoder/.*(/kernel|_embedding|/lora_[ab])", ("encoder", True)),
  (r"prototype/.*/bias", ("new", False)),
  (r"prototype/.*(/kernel|norm/scale)", ("new", True)),
  (r"free_vectors", ("free_vectors", False)),
  (r"fusion/.*/bias", ("new", False)),
  (r"fusion/.*(/kernel|norm/scale)", ("new", True)),
)


# The same rules, except that the norm scales of an encoder's layers are decayed. The published code excludes biases and
# parameters named `LayerNorm.weight`. In DistilBERT only the norm of the embeddings has this name; those of its layers
# are `sa_layer_norm` and `output_layer_norm`.
RULES_WITH_DECAYED_LAYER_NORMS: Rules = (
  (r"encoder/layers/.*norm/scale", ("encoder", True)),
  (r"encoder/(?!layers/).*norm/scale", ("encoder", False)),
  *(rule for rule in RULES if rule[0] != r"encoder/.*norm/scale"),
)


def path_name(path: tuple[Any, ...]) -> str:
  """Returns the name of a JAX key path, such as `encoder/layers/up/kernel`."""
  return "/".join(str(part.key) for part in path)


def parameter_groups(params: Tree, rules: Rules = RULES) -> Tree:
  """Returns for every parameter its (name of the learning rate, decayed) pair.

  Raises:
    ValueError: no rule matches a parameter, or more than one does.
  """

  def group(path: tuple[Any, ...], _: Any) -> tuple[str, bool]:
    name = path_name(path)
    found = [value for pattern, value in rules if re.fullmatch(pattern, name)]
    if len(found) != 1:
      raise ValueError(f"{name}: {len(found)} optimizer rules match, one must")
    return found[0]

  return jax.tree_util.tree_map_with_path(group, params)


def schedule(warmup_steps: int, total_steps: int | Array) -> optax.Schedule:
  """Returns the factor on the learning rate: 0 at step 0, 1 at `warmup_steps`, 0 at `total_steps`, linear between."""
  if not warmup_steps >= 0:
    raise InputError(f"train.warmup_steps={warmup_steps}: must not be negative")

  def factor(step: Any) -> Array:
    step = jnp.asarray(step, jnp.float32)
    rising = step / max(warmup_steps, 1)
    falling = (total_steps - step) / jnp.maximum(total_steps - warmup_steps, 1)
    return jnp.where(step < warmup_steps, rising, jnp.maximum(falling, 0.0))

  return factor


def scale_by_linear_schedule(warmup_steps: int, total_steps: int) -> optax.GradientTransformationExtraArgs:
  """Returns `optax.scale_by_schedule` of `schedule`, whose update also takes another `total_steps`."""
  fixed = optax.scale_by_schedule(schedule(warmup_steps, total_steps))

  def update(
    updates: Tree, state: Any, params: Tree | None = None, *, total_steps: Array | None = None, **_: Any
  ) -> tuple[Tree, Any]:
    scale = fixed if total_steps is None else optax.scale_by_schedule(schedule(warmup_steps, total_steps))
    return scale.update(updates, state, params)

  return optax.GradientTransformationExtraArgs(fixed.init, update)


def optimizer_from_config(
  config: ConfigDict, model: ModelDefinition, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer that a config describes, for a run of `total_steps`."""
  train = config.train
  return make_optimizer(
    model.split(model.shapes)[0],
    learning_rate=train.learning_rate,
    new_learning_rate=train.new_learning_rate,
    free_vector_learning_rate=train.free_vector_learning_rate,
    warmup_steps=train.warmup_steps,
    total_steps=total_steps,
    weight_decay=train.weight_decay,
    decay_layer_norms=train.decay_layer_norms,
    adam_eps=train.adam_eps,
    clip_norm=train.clip_norm or None,
  )


def learning_rates(config: ConfigDict, total_steps: int) -> dict[str, list[tuple[float, float]]]:
  """Returns for each group of parameters the (step, learning rate) pairs between which the rate is linear."""
  train = config.train
  factor = schedule(train.warmup_steps, total_steps)
  peaks = {
    "encoder": train.learning_rate,
    "new parameters": train.new_learning_rate,
    "free vectors": train.free_vector_learning_rate,
  }
  turns = (0, min(train.warmup_steps, total_steps), total_steps)
  return {name: [(step, peak * float(factor(step))) for step in turns] for name, peak in peaks.items()}


def make_optimizer(
  params: Tree,
  *,
  learning_rate: float,
  new_learning_rate: float,
  free_vector_learning_rate: float,
  warmup_steps: int,
  total_steps: int,
  weight_decay: float = 0.01,
  decay_layer_norms: bool = False,
  adam_eps: float = 1e-6,
  clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns AdamW with three learning rates (ViXML, arXiv 2511.13189, implementation details).

  Its update takes another number of steps as `total_steps`, if that was not known when the optimizer was made.

  Args:
    params: tree of the trained parameters or their shapes; only the paths are used.
    learning_rate: peak rate of the pretrained encoder, or of its adapters.
    new_learning_rate: peak rate of image fusion and prototype network, which start from scratch.
    free_vector_learning_rate: peak rate of the free vectors.
    warmup_steps: steps of linear warm-up.
    total_steps: steps of the whole run.
    weight_decay: decoupled weight decay; not applied to biases, the encoder's norm scales and free vectors.
    decay_layer_norms: apply it to the norm scales of the encoder's layers, as the published code does for DistilBERT.
    adam_eps: added to the root of the second moment.
    clip_norm: largest global gradient norm; None for no clipping.
  """
  groups = parameter_groups(params, RULES_WITH_DECAYED_LAYER_NORMS if decay_layer_norms else RULES)
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
    scale_by_linear_schedule(warmup_steps, total_steps),
  ]
  return optax.chain(*steps)
