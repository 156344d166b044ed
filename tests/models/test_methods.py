"""Scoring and loss of PRIME, NGAME, DEXA and means against plain transcriptions in torch: values and gradients.

The transcriptions follow `SiameseNetwork.encode_label` and `train` of DiegoOrtego/vixml, and `AuxLayer` of
Extreme-classification/dexa.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.helpers.miniature_runs import TINY
from tests.helpers.torch_layers import copy_torch_layer, torch_layer
from vixml_jax import losses
from vixml_jax.models.definition import define_model
from vixml_jax.models.dual_encoder import METHODS, DualEncoder, l2_normalize
from vixml_jax.models.parameters import merge_params, split_params

ENCODER = TINY | dict(num_token_types=0)
DIM, CLUSTERS, BATCH = TINY["embed_dim"], 4, 10
CONFIGS = {
  "prime": losses.LossConfig(num_negatives=4),
  "ngame": losses.LossConfig(num_negatives=4, margin_min=0.3, margin_max=0.3, reverse_weight=0.0),
  "dexa": losses.LossConfig(num_negatives=4, margin_min=0.3, margin_max=0.3, reverse_weight=0.0),
  "mean": losses.LossConfig(num_negatives=4, margin_min=0.3, margin_max=0.3, reverse_weight=0.0),
  "ngame with a reverse term": losses.LossConfig(num_negatives=4, margin_min=0.3, margin_max=0.3, reverse_weight=0.5),
}

WITH_FREE_VECTORS = ("prime", "dexa")


def triplet(sim, positives, drawn, config):
  """The triplet loss of a similarity matrix in torch: hardest negatives, margin, softmax over violators."""
  s_pos = sim[torch.arange(len(sim)), drawn][:, None]
  ranked = torch.where(positives, torch.full_like(sim, -50.0), sim)
  s_neg = sim.gather(1, ranked.topk(config.num_negatives, dim=1).indices)
  margin = (s_pos - s_neg).detach().abs().clamp(config.margin_min, config.margin_max)
  hinge = torch.maximum(torch.zeros_like(s_neg), s_neg - s_pos + margin)
  weights = torch.softmax(torch.where(hinge > 0, s_neg, torch.full_like(s_neg, -50.0)) / config.temperature, dim=1)
  return (hinge * weights).sum(1).mean()


def regulariser(label_sim, prototype_sim, positives, drawn, config):
  """The regularizer of PRIME in torch."""
  rows = torch.arange(len(label_sim))
  pull = torch.relu(label_sim[rows, drawn] - prototype_sim[rows, drawn] + config.regulariser_margin)
  ranked = torch.where(positives, torch.full_like(prototype_sim, -50.0), prototype_sim)
  columns = ranked.topk(config.num_negatives, dim=1).indices
  push = torch.relu(prototype_sim.gather(1, columns) - label_sim.gather(1, columns) + config.regulariser_margin)
  return sum(x.sum() / max(int((x > 0).sum()), 1) for x in (pull, push)) / 2


@pytest.mark.parametrize("case", CONFIGS)
def test_prototypes_loss_and_gradients_equal_a_transcription_in_torch(case):
  method, config = case.split()[0], CONFIGS[case]
  arguments = define_model(ENCODER, dict(num_heads=4, mlp_dim=16), CLUSTERS, method=method).arguments
  module = DualEncoder(**arguments, rngs=nnx.Rngs(0))
  layer = torch_layer(DIM, 4, 16)
  if method == "prime":
    copy_torch_layer(layer, module.prototype.layer)
  graphdef, params, _ = split_params(module)
  rng = np.random.default_rng(0)
  draw = lambda rows, scale: (scale * rng.normal(size=(rows, DIM))).astype(np.float32)
  arrays = {"queries": draw(BATCH, 3.0), "labels": draw(BATCH, 3.0), "free": draw(CLUSTERS, 2.0)}
  centroids, clusters = draw(BATCH, 0.2), rng.integers(0, CLUSTERS, BATCH)
  positives = (rng.random((BATCH, BATCH)) < 0.1) | np.eye(BATCH, dtype=bool)
  valid, key = jnp.ones(BATCH, bool), jax.random.key(3)

  def ours(arrays):
    bound = merge_params(graphdef, params | ({"free_vectors": arrays["free"]} if method in WITH_FREE_VECTORS else {}))
    prototypes = bound.prototypes(arrays["labels"], jnp.asarray(clusters), jnp.asarray(centroids))
    queries, labels = l2_normalize(arrays["queries"]), l2_normalize(arrays["labels"])
    last = (jnp.asarray(positives), valid, key, config)
    loss, _ = (
      losses.prime_loss(queries, labels, prototypes, *last)
      if method == "prime"
      else losses.siamese_loss(queries, prototypes, *last)
    )
    return loss, prototypes

  (loss, prototypes), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(arrays)

  theirs = {name: torch.tensor(value, requires_grad=True) for name, value in arrays.items()}
  u, free = theirs["labels"], theirs["free"][clusters]
  vectors = {
    "ngame": lambda: u,
    "dexa": lambda: u + free,
    "mean": lambda: normalize(u) + normalize(torch.tensor(centroids)),
    "prime": lambda: layer(torch.stack([u, free, torch.tensor(centroids)], dim=1)).mean(1),
  }
  scored = normalize(vectors[method]())
  np.testing.assert_allclose(prototypes, scored.detach(), atol=2e-6)
  # The positives are drawn with our keys; everything after is torch.
  forward, backward = torch.tensor(positives), torch.tensor(positives.T)
  drawn = [
    torch.tensor(np.asarray(losses.draw_positive(each, jnp.asarray(of))).astype(np.int64))
    for each, of in zip(
      jax.random.split(key, 4 if method == "prime" else 2),
      (positives, positives, positives.T, positives) if method == "prime" else (positives, positives.T),
      strict=True,
    )
  ]
  queries, plain = normalize(theirs["queries"]), normalize(u)
  if method == "prime":
    label_sim, prototype_sim = queries @ plain.T, queries @ scored.T
    wanted = (
      triplet(label_sim, forward, drawn[0], config)
      + triplet(prototype_sim, forward, drawn[1], config)
      + triplet(label_sim.T, backward, drawn[2], config)
      + 0.1 * regulariser(label_sim, prototype_sim, forward, drawn[3], config)
    )
  else:
    sim = queries @ scored.T
    wanted = triplet(sim, forward, drawn[0], config) + config.reverse_weight * triplet(
      sim.T, backward, drawn[1], config
    )
  np.testing.assert_allclose(loss, wanted.detach(), rtol=1e-5)
  wanted.backward()
  for name, gradient in gradients.items():
    if method not in WITH_FREE_VECTORS and name == "free":
      assert theirs[name].grad is None and not np.any(gradient)
      continue
    assert np.abs(gradient).max() > 1e-4, name
    np.testing.assert_allclose(gradient, theirs[name].grad, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_no_parameters_that_it_does_not_use(method):
  shapes = define_model(ENCODER, dict(num_heads=4, mlp_dim=16), CLUSTERS, method=method).shapes
  used = {"prime": {"prototype", "free_vectors"}, "dexa": {"free_vectors"}, "ngame": set(), "mean": set()}
  assert set(shapes) == {"encoder"} | used[method]


def test_padding_does_not_change_the_loss_of_ngame():
  rng = np.random.default_rng(0)
  queries, labels = (np.asarray(l2_normalize(jnp.asarray(rng.normal(size=(BATCH, DIM))))) for _ in range(2))
  valid = np.arange(BATCH) < 6
  config = CONFIGS["ngame with a reverse term"]

  def loss(queries, labels, positives):
    return losses.siamese_loss(*map(jnp.asarray, (queries, labels, positives, valid)), jax.random.key(0), config)[0]

  clean = loss(queries, labels, np.eye(BATCH, dtype=bool))
  spoiled = [np.where(valid[:, None], x, 7.0) for x in (queries, labels)]
  np.testing.assert_allclose(loss(*spoiled, np.eye(BATCH, dtype=bool) | ~valid | ~valid[:, None]), clean, rtol=1e-6)
