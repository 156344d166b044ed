"""The optimizer against torch's AdamW with the same groups; the schedule against that of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from tests.helpers.miniature_runs import load_config
from vixml_jax.training import optimizer

RATES = {"encoder": 0.01, "new": 0.03, "free_vectors": 0.1}
# Path -> (shape, learning rate, whether it decays), as in the published code of PRIME and ViXML.
PARAMETERS = {
  "encoder/word_embedding": ((5, 4), "encoder", True),
  "encoder/embedding_norm/scale": ((4,), "encoder", False),
  "encoder/embedding_norm/bias": ((4,), "encoder", False),
  "encoder/layers/up/kernel": ((2, 4, 3), "encoder", True),
  "encoder/layers/up/bias": ((2, 3), "encoder", False),
  "encoder/layers/mlp_norm/scale": ((2, 4), "encoder", False),
  "encoder/layers/attention/query/lora_a": ((2, 4, 2), "encoder", True),
  "encoder/layers/attention/query/lora_b": ((2, 2, 3), "encoder", True),
  "prototype/layer/down/kernel": ((3, 4), "new", True),
  "prototype/layer/down/bias": ((4,), "new", False),
  "prototype/layer/mlp_norm/scale": ((4,), "new", True),
  "prototype/layer/mlp_norm/bias": ((4,), "new", False),
  "free_vectors": ((6, 4), "free_vectors", False),
  "fusion/project/kernel": ((3, 4), "new", True),
  "fusion/project/bias": ((4,), "new", False),
  "fusion/mixer/mlp_norm/scale": ((4,), "new", True),
  "fusion/residual/kernel": ((3, 4), "new", True),
  "fusion/residual/bias": ((4,), "new", False),
}


def nested(values):
  tree = {}
  for name, value in values.items():
    *folders, leaf = name.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[leaf] = jnp.asarray(value)
  return tree


def flat(tree):
  return {optimizer.path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_updates_are_those_of_torch_adamw_with_the_same_groups(clip_norm):
  rng = np.random.default_rng(0)
  draw = lambda: {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _, _) in PARAMETERS.items()}
  start, gradients = draw(), [draw() for _ in range(4)]

  theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
  adamw = torch.optim.AdamW(
    [
      dict(params=[theirs[name]], lr=RATES[rate], weight_decay=0.3 if decays else 0.0)
      for name, (_, rate, decays) in PARAMETERS.items()
    ],
    eps=1e-6,
  )
  warm_up = transformers.get_linear_schedule_with_warmup(adamw, 2, 6)

  params = nested(start)
  ours = optimizer.make_optimizer(
    params,
    learning_rate=RATES["encoder"],
    new_learning_rate=RATES["new"],
    free_vector_learning_rate=RATES["free_vectors"],
    warmup_steps=2,
    total_steps=6,
    weight_decay=0.3,
    adam_eps=1e-6,
    clip_norm=clip_norm,
  )
  state, update = ours.init(params), jax.jit(ours.update)
  for step in range(4):
    updates, state = update(nested(gradients[step]), state, params)
    params = optax.apply_updates(params, updates)
    for name, gradient in gradients[step].items():
      theirs[name].grad = torch.tensor(gradient)
    if clip_norm:
      torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
    adamw.step()
    warm_up.step()
    for name, value in flat(params).items():
      np.testing.assert_allclose(value, theirs[name].detach(), atol=2e-6, err_msg=f"{name} after step {step}")
  moved = [np.abs(value - start[name]).max() for name, value in flat(params).items()]
  assert min(moved) > 1e-3


@pytest.mark.parametrize("warmup,total", [(0, 7), (3, 10), (10, 10), (12, 10)])
def test_schedule_is_that_of_transformers(warmup, total):
  adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
  theirs = transformers.get_linear_schedule_with_warmup(adamw, warmup, total).lr_lambdas[0]
  ours = optimizer.schedule(warmup, total)
  steps = range(total + 3)
  np.testing.assert_allclose([ours(step) for step in steps], [theirs(step) for step in steps], rtol=1e-6)


def test_a_number_of_steps_that_is_known_later_gives_the_updates_of_an_optimizer_made_for_it():
  params = nested({name: np.ones(3, np.float32) for name in PARAMETERS})
  rates = dict(learning_rate=0.1, new_learning_rate=0.2, free_vector_learning_rate=0.3, warmup_steps=2)
  known, later = (optimizer.make_optimizer(params, **rates, total_steps=total) for total in (9, 1000))
  states = known.init(params), later.init(params)
  update = jax.jit(lambda state, total: later.update(params, state, params, total_steps=total))
  for _ in range(9):
    wanted, first = known.update(params, states[0], params)
    found, second = update(states[1], jnp.int32(9))
    states = first, second
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)) < 0.1 < np.abs(params["free_vectors"]).max()


def test_a_parameter_without_a_rule_is_refused():
  with pytest.raises(ValueError, match="encoder/layers/up/gate: 0 optimizer rules match"):
    optimizer.parameter_groups(nested({"encoder/layers/up/gate": np.zeros(2)}))


def test_a_parameter_with_two_rules_is_refused():
  rules = (*optimizer.RULES, (r".*up/kernel", ("new", True)))
  with pytest.raises(ValueError, match="encoder/layers/up/kernel: 2 optimizer rules match"):
    optimizer.parameter_groups(nested({"encoder/layers/up/kernel": np.zeros(2)}), rules)


# Names of norms as transformers gives them -> ours; and whether the published code decays them there.
NORMS = {
  "BertModel": {
    "embeddings.LayerNorm.weight": "embedding_norm",
    "encoder.layer.0.attention.output.LayerNorm.weight": "layers/attention_norm",
    "encoder.layer.0.output.LayerNorm.weight": "layers/mlp_norm",
  },
  "DistilBertModel": {
    "embeddings.LayerNorm.weight": "embedding_norm",
    "transformer.layer.0.sa_layer_norm.weight": "layers/attention_norm",
    "transformer.layer.0.output_layer_norm.weight": "layers/mlp_norm",
  },
}


@pytest.mark.parametrize("encoder,kind", [("bert", "BertModel"), ("distilbert", "DistilBertModel")])
def test_norms_are_decayed_where_the_published_code_excludes_other_names(encoder, kind):
  sizes = dict(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
  if kind == "DistilBertModel":
    sizes = dict(vocab_size=8, dim=4, n_layers=1, n_heads=1, hidden_dim=4)
  theirs = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**sizes))
  excluded = ("bias", "LayerNorm.weight")  # `no_decay` of PRIME and ViXML.
  wanted = {
    ours: not any(part in name for part in excluded)
    for name, ours in NORMS[kind].items()
    if theirs.get_parameter(name).ndim
  }
  decay_layers = load_config("lf_amazon_titles_131k", f"encoder={encoder}").train.decay_layer_norms
  rules = optimizer.RULES_WITH_DECAYED_LAYER_NORMS if decay_layers else optimizer.RULES
  groups = optimizer.parameter_groups(nested(dict.fromkeys((f"encoder/{name}/scale" for name in wanted), 0.0)), rules)
  found = {
    optimizer.path_name(path).removeprefix("encoder/").removesuffix("/scale"): group[1]
    for path, group in jax.tree_util.tree_leaves_with_path(groups, is_leaf=lambda node: isinstance(node, tuple))
  }
  assert found == wanted


def test_all_parameters_but_the_norms_of_layers_have_the_same_group_under_both_rules():
  params = nested({name: np.zeros(shape) for name, (shape, _, _) in PARAMETERS.items()})
  plain, other = (
    optimizer.parameter_groups(params, rules) for rules in (optimizer.RULES, optimizer.RULES_WITH_DECAYED_LAYER_NORMS)
  )
  assert other["encoder"]["layers"]["mlp_norm"].pop("scale") == ("encoder", True)
  assert plain["encoder"]["layers"]["mlp_norm"].pop("scale") == ("encoder", False)
  assert plain == other
