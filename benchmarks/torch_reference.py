"""ViXML's model, loss and optimizer in plain PyTorch, to compare `vixml_jax` with.

It is written from the formulas of the papers, ViXML (arXiv 2511.13189) and PRIME (arXiv 2410.20401), and imports only
the constants of the loss from `vixml_jax`. Items are padded, not packed. The encoder is that of transformers and the
prototype layer that of torch. It covers BERT and MiniLM with images by early fusion and mean pooling.
"""

from collections import defaultdict
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
import transformers

from vixml_jax.losses import LossConfig


@dataclasses.dataclass(frozen=True)
class PaddedItems:
  """Queries or labels, one in each row, padded to the longest text and the most images.

  Attributes:
    tokens: Token ids of the texts, int64 [B, T].
    token_mask: Which tokens exist, bool [B, T].
    images: Feature vectors of the images, float32 [B, I, F].
    image_mask: Which images exist, bool [B, I].
  """

  tokens: Tensor
  token_mask: Tensor
  images: Tensor
  image_mask: Tensor


class ReferenceModel(torch.nn.Module):
  """The encoder of queries and labels, the map of images, the free vectors and the prototype layer.

  Args:
    encoder: Encoder of the BERT family, without a pooling layer.
    image_dim: F, width of an image's feature vector.
    num_free_vectors: Number of free vectors.
    prototype_heads: Number of attention heads of the prototype layer.
    prototype_mlp_dim: Feed-forward width of the prototype layer.
    prototype_dropout: Dropout rate of the prototype layer.
  """

  def __init__(
    self,
    encoder: transformers.BertModel,
    image_dim: int,
    num_free_vectors: int,
    prototype_heads: int,
    prototype_mlp_dim: int,
    prototype_dropout: float,
  ):
    super().__init__()
    dim = encoder.config.hidden_size
    self.encoder = encoder
    self.image_projection = torch.nn.Linear(image_dim, dim)
    self.free_vectors = torch.nn.Parameter(torch.empty(num_free_vectors, dim))
    torch.nn.init.xavier_uniform_(self.free_vectors)
    self.prototype = torch.nn.TransformerEncoderLayer(
      dim, prototype_heads, prototype_mlp_dim, prototype_dropout, activation="gelu", batch_first=True
    )

  def pool(self, items: PaddedItems) -> Tensor:
    """Returns the mean output over an item's images and tokens, [B, D]; positions count what exists, images first."""
    words = self.encoder.get_input_embeddings()(items.tokens)
    mask = torch.cat([items.image_mask, items.token_mask], dim=1)
    hidden = self.encoder(
      inputs_embeds=torch.cat([self.image_projection(items.images), words], dim=1),
      attention_mask=mask.long(),
      position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
    ).last_hidden_state
    counted = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * counted).sum(dim=1) / counted.sum(dim=1)

  def prototypes(self, pooled: Tensor, clusters: Tensor, centroids: Tensor) -> Tensor:
    """Returns unit-norm prototypes of labels, [B, D].

    Args:
      pooled: Pooled encoder outputs of the labels, before normalization, [B, D].
      clusters: Free vector of each label, int64 [B].
      centroids: Centroids of the labels, [B, D].
    """
    vectors = torch.stack([pooled, self.free_vectors[clusters], centroids], dim=1)
    return functional.normalize(self.prototype(vectors).mean(dim=1), dim=1)


def copy_new_parameters(params: dict[str, Any], model: ReferenceModel) -> None:
  """Copies parameters of `vixml_jax` into everything but the encoder.

  Args:
    params: Parameters of `vixml_jax` on the host.
    model: The model, whose encoder has its weights already.
  """
  layer, dim = params["prototype"]["layer"], params["free_vectors"].shape[1]
  attention = layer["attention"]
  projections = [attention[name] for name in ("query", "key", "value")]
  values = {
    "free_vectors": params["free_vectors"],
    "prototype.self_attn.in_proj_weight": np.concatenate([part["kernel"].reshape(dim, dim).T for part in projections]),
    "prototype.self_attn.in_proj_bias": np.concatenate([part["bias"].reshape(dim) for part in projections]),
    "prototype.self_attn.out_proj.weight": attention["output"]["kernel"].reshape(dim, dim).T,
    "prototype.self_attn.out_proj.bias": attention["output"]["bias"],
  }
  for theirs, ours in {"linear1": "up", "linear2": "down"}.items():
    values |= {f"prototype.{theirs}.weight": layer[ours]["kernel"].T, f"prototype.{theirs}.bias": layer[ours]["bias"]}
  for theirs, ours in {"norm1": "attention_norm", "norm2": "mlp_norm"}.items():
    values |= {f"prototype.{theirs}.weight": layer[ours]["scale"], f"prototype.{theirs}.bias": layer[ours]["bias"]}
  if "fusion" in params:
    project = params["fusion"]["project"]
    values |= {"image_projection.weight": project["kernel"].T, "image_projection.bias": project["bias"]}
  targets = dict(model.named_parameters())
  with torch.no_grad():
    for name, value in values.items():
      targets[name].copy_(torch.tensor(value))


def triplet_loss(sim: Tensor, positives: Tensor, drawn: Tensor, constants: LossConfig) -> Tensor:
  """Returns the triplet loss with online hard negatives, a dynamic margin and softmax weights.

  Args:
    sim: Similarities of rows to columns, [A, B].
    positives: Which columns are positives of each row, bool [A, B].
    drawn: The positive that each row is compared with, int64 [A].
    constants: Constants of the loss.
  """
  positive_sim = sim.gather(1, drawn[:, None])
  columns, exists = hardest_negatives(sim, positives, constants.num_negatives)
  negative_sim = sim.gather(1, columns)
  margin = (positive_sim - negative_sim).abs().clamp(constants.margin_min, constants.margin_max).detach()
  # torch.maximum gives half of the gradient where both arguments are equal, which relu does not.
  hinge = torch.maximum(negative_sim - positive_sim + margin, torch.zeros(()))
  logits = torch.where(hinge > 0, negative_sim, -50.0) / constants.temperature
  weights = logits.masked_fill(~exists, -torch.inf).softmax(dim=1)
  return (hinge * weights).sum(dim=1).mean()


def prototype_regularizer(
  label_sim: Tensor, prototype_sim: Tensor, positives: Tensor, drawn: Tensor, constants: LossConfig
) -> Tensor:
  """Returns the hinges by which prototypes must be better than plain labels, averaged over their non-zero terms.

  Args:
    label_sim: Similarities of queries to plain labels, [B, B].
    prototype_sim: Similarities of queries to prototypes, [B, B].
    positives: As in `triplet_loss`.
    drawn: As in `triplet_loss`.
    constants: As in `triplet_loss`.
  """
  drawn = drawn[:, None]
  pull = label_sim.gather(1, drawn) - prototype_sim.gather(1, drawn) + constants.regulariser_margin
  columns, exists = hardest_negatives(prototype_sim, positives, constants.num_negatives)
  push = prototype_sim.gather(1, columns) - label_sim.gather(1, columns) + constants.regulariser_margin
  means = []
  for hinge in (pull.relu(), push[exists].relu()):
    means.append(hinge.sum() / (hinge > 0).sum().clamp(min=1))
  return (means[0] + means[1]) / 2


def hardest_negatives(sim: Tensor, positives: Tensor, count: int) -> tuple[Tensor, Tensor]:
  """Returns the columns of the most similar negatives of each row, int64 [A, count], and which exist, bool."""
  values, columns = sim.detach().masked_fill(positives, -torch.inf).topk(min(count, sim.shape[1]), dim=1)
  return columns, values > -torch.inf


def prime_loss(
  queries: Tensor, labels: Tensor, prototypes: Tensor, positives: Tensor, drawn: Sequence[Tensor], constants: LossConfig
) -> dict[str, Tensor]:
  """Returns the PRIME loss under `loss`, and its four terms.

  Args:
    queries: Unit-norm embeddings of the queries, [B, D].
    labels: Unit-norm plain embeddings of the labels, [B, D].
    prototypes: Unit-norm prototypes of the labels, [B, D].
    positives: Whether label j of the batch is a positive of query i, bool [B, B].
    drawn: The positives drawn for the four terms in their order, int64 [B] each.
    constants: Constants of the loss.
  """
  label_sim, prototype_sim = queries @ labels.T, queries @ prototypes.T
  parts = {
    "triplet_label": triplet_loss(label_sim, positives, drawn[0], constants),
    "triplet_prototype": triplet_loss(prototype_sim, positives, drawn[1], constants),
    "triplet_reverse": triplet_loss(label_sim.T, positives.T, drawn[2], constants),
    "regulariser": prototype_regularizer(label_sim, prototype_sim, positives, drawn[3], constants),
  }
  weights = {"triplet_reverse": constants.reverse_weight, "regulariser": constants.regulariser_weight}
  return parts | {"loss": sum(weights.get(name, 1.0) * value for name, value in parts.items())}


def make_optimizer(
  model: ReferenceModel,
  *,
  learning_rate: float,
  new_learning_rate: float,
  free_vector_learning_rate: float,
  weight_decay: float,
  adam_eps: float,
  warmup_steps: int,
  total_steps: int,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
  """Returns AdamW, and its schedule of linear warm-up and linear decay.

  Biases, the encoder's norm scales and free vectors are not decayed. The norm scales of the prototype layer are, as in
  the published code.

  Args:
    model: The model.
    learning_rate: Peak rate of the encoder.
    new_learning_rate: Peak rate of the map of images and of the prototype layer.
    free_vector_learning_rate: Peak rate of the free vectors.
    weight_decay: Decoupled weight decay.
    adam_eps: Added to the root of the second moment.
    warmup_steps: Steps of the warm-up.
    total_steps: Steps of the whole run.
  """
  groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
  for name, parameter in model.named_parameters():
    if name == "free_vectors":
      groups[free_vector_learning_rate, 0.0].append(parameter)
      continue
    rate = learning_rate if name.startswith("encoder.") else new_learning_rate
    decayed = not name.endswith("bias") and "LayerNorm.weight" not in name
    groups[rate, weight_decay if decayed else 0.0].append(parameter)
  optimizer = torch.optim.AdamW(
    [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()],
    eps=adam_eps,
  )
  return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, total_steps)
