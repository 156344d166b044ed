"""Float64 transcriptions in numpy of the losses and prototypes, from the equations of the papers, with gradients.

Each loss returns its value and its gradients, which are derived by hand. `near_tie` says where a value is so close to
a point at which the gradient jumps that float32 may fall on the other side.
"""

import numpy as np
import scipy.special

_NO_VIOLATION = -50.0  # Published code: the logit of a negative that does not violate its margin.
_TIE = 1e-5


def unit(x):
  """Returns rows scaled to unit norm, as v / max(|v|, 1e-12); a zero row stays zero."""
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def unit_gradient(x, upstream):
  """Returns the gradient of `unit`: (g - u (u . g)) / |v|, and g / 1e-12 below the bound."""
  x, upstream = np.asarray(x, np.float64), np.asarray(upstream, np.float64)
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  u = unit(x)
  along = np.where(norm > 1e-12, u * np.sum(u * upstream, -1, keepdims=True), 0)
  return (upstream - along) / np.maximum(norm, 1e-12)


def hardest(row, is_negative, count):
  """Returns the columns of the `count` most similar negatives of a row, the lower column first among equals."""
  order = np.argsort(-row, kind="stable")
  return order[is_negative[order]][:count]


def triplet(sim, positives, drawn, config, valid):
  """Returns PRIME's triplet loss (arXiv 2410.20401, equations of the objective), d loss / d sim, and `near_tie`.

  A row's loss is sum_n w_n max(0, s_n - s_p + margin_n), with margin_n = clip(|s_p - s_n|), a constant, and w the
  softmax of s_n / temperature over the negatives that violate. The subgradient of max at a tie is 1/2.
  """
  total, gradient, near_tie = 0.0, np.zeros_like(sim), False
  rows = np.flatnonzero(valid & positives.any(1))
  for i in rows:
    negatives = hardest(sim[i], ~positives[i] & valid, config.num_negatives)
    if not len(negatives):
      continue
    s_p, s_n = sim[i, drawn[i]], sim[i, negatives]
    gap = np.abs(s_p - s_n)
    x = s_n - s_p + np.clip(gap, config.margin_min, config.margin_max)
    inside = (gap >= config.margin_min) & (gap <= config.margin_max) & (s_n <= s_p)
    x[inside] = 0.0
    for bound in (config.margin_min, config.margin_max):
      near_tie |= bool(np.any((np.abs(gap - bound) < _TIE) & (s_n <= s_p + _TIE)))
    hinge, slope = np.maximum(x, 0), np.where(x > 0, 1.0, np.where(x == 0, 0.5, 0.0))
    logits = np.where(hinge > 0, s_n, _NO_VIOLATION) / config.temperature
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    row_loss = np.sum(hinge * weights)
    total += row_loss
    through_weights = weights * (hinge - row_loss) / config.temperature * (hinge > 0)
    gradient[i, negatives] += weights * slope + through_weights
    gradient[i, drawn[i]] -= np.sum(weights * slope)
  count = max(len(rows), 1)
  return total / count, gradient / count, near_tie


def regulariser(label_sim, prototype_sim, positives, drawn, config, valid):
  """Returns PRIME's regularizer (arXiv 2410.20401), its gradients by both matrices, and `near_tie`.

  It is half of mean+ max(0, s_u - s_p + m) over the drawn positives and mean+ max(0, s_p - s_u + m) over the hardest
  negatives by prototype, where mean+ is the mean over terms above 0.
  """
  rows = np.flatnonzero(valid & positives.any(1))
  pulls = [(i, drawn[i]) for i in rows]
  pushes = [(i, j) for i in rows for j in hardest(prototype_sim[i], ~positives[i] & valid, config.num_negatives)]
  value, near_tie = 0.0, False
  gradients = np.zeros_like(label_sim), np.zeros_like(label_sim)
  for places, sign in ((pulls, 1.0), (pushes, -1.0)):
    terms = np.array([sign * (label_sim[at] - prototype_sim[at]) + config.regulariser_margin for at in places])
    near_tie |= bool(np.any(np.abs(terms) < _TIE))
    count = max(int((terms > 0).sum()), 1)
    value += np.maximum(terms, 0).sum() / count / 2
    for at, term in zip(places, terms, strict=True):
      slope = sign * (term > 0) / count / 2
      gradients[0][at] += slope
      gradients[1][at] -= slope
  return value, gradients, near_tie


def prime(sims, drawn, positives, valid, config):
  """Returns PRIME's objective from the similarities to labels and to prototypes, its gradients by both, `near_tie`.

  triplet(q, u) + triplet(q, prototype) + `reverse_weight` triplet(u, q) + `regulariser_weight` regularizer.
  """
  positives = positives & valid[:, None] & valid[None, :]
  to_label, by_label, tie_1 = triplet(sims[0], positives, drawn[0], config, valid)
  to_prototype, by_prototype, tie_2 = triplet(sims[1], positives, drawn[1], config, valid)
  reverse, by_reverse, tie_3 = triplet(sims[0].T, positives.T, drawn[2], config, valid)
  extra, by_extra, tie_4 = regulariser(*sims, positives, drawn[3], config, valid)
  value = to_label + to_prototype + config.reverse_weight * reverse + config.regulariser_weight * extra
  gradients = (
    by_label + config.reverse_weight * by_reverse.T + config.regulariser_weight * by_extra[0],
    by_prototype + config.regulariser_weight * by_extra[1],
  )
  return value, gradients, tie_1 or tie_2 or tie_3 or tie_4


def siamese(sims, drawn, positives, valid, config):
  """Returns the loss of NGAME (arXiv 2207.04452) and DEXA, triplet(q, p) + `reverse_weight` triplet(p, q)."""
  positives = positives & valid[:, None] & valid[None, :]
  value, gradient, tie = triplet(sims[0], positives, drawn[0], config, valid)
  reverse, by_reverse, reverse_tie = triplet(sims[0].T, positives.T, drawn[1], config, valid)
  weight = config.reverse_weight
  return value + weight * reverse, (gradient + weight * by_reverse.T,), tie or (bool(weight) and reverse_tie)


def through_similarities(embeddings, by_sims):
  """Returns the gradients by the embeddings (queries first) of a function of queries @ other.T for each other."""
  queries, *others = (np.asarray(x, np.float64) for x in embeddings)
  by_queries = sum(by_sim @ other for by_sim, other in zip(by_sims, others, strict=True))
  return [by_queries, *(by_sim.T @ queries for by_sim in by_sims)]


def post_norm_layer(params, x):
  """Returns the outputs [B, T, D] of a transformer encoder layer with a norm after each residual sum, as in PRIME."""
  attention = params["attention"]
  project = lambda name: np.einsum("btd,dhk->bhtk", x, attention[name]["kernel"]) + attention[name]["bias"][:, None]
  query, key, value = (project(name) for name in ("query", "key", "value"))
  logits = np.einsum("bhtk,bhsk->bhts", query, key) / np.sqrt(query.shape[-1])
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  mixed = np.einsum("bhts,bhsk->bthk", weights, value)
  y = np.einsum("bthk,hkd->btd", mixed, attention["output"]["kernel"]) + attention["output"]["bias"]
  x = _layer_norm(params["attention_norm"], x + y)
  hidden = x @ params["up"]["kernel"] + params["up"]["bias"]
  hidden = hidden * scipy.special.ndtr(hidden)  # GELU.
  return _layer_norm(params["mlp_norm"], x + hidden @ params["down"]["kernel"] + params["down"]["bias"])


def _layer_norm(params, x, eps=1e-5):
  centered = x - x.mean(-1, keepdims=True)
  return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * params["scale"] + params["bias"]
