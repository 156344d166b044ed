"""Both sides of `benchmarks.parity_torch`: a run before its first step, our training and the transcription's."""

from collections.abc import Iterable, Iterator
import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import torch
from torch.nn import functional
import transformers

from benchmarks import torch_reference
from vixml_jax.errors import InputError
from vixml_jax.evaluation import metrics
from vixml_jax.input.batches import Batch, TrainingQueries, make_batch, steps_per_epoch
from vixml_jax.input.items import Items
from vixml_jax.losses import draw_positive
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.mining.order import cluster_size_at, epoch_order, is_cluster_update, num_query_clusters
from vixml_jax.models.parameters import join_params
from vixml_jax.ragged import Ragged
from vixml_jax.run import configuration
from vixml_jax.run.setup import RunSetup, set_up_run
from vixml_jax.run.state import TrainState, abstract_state
from vixml_jax.training.loop import training_queries
from vixml_jax.training.start import initial_checkpoint
from vixml_jax.training.step import DeviceBatch, StepConfig, batch_loss, device_batch, make_train_step, step_config
from vixml_jax.typing import Tree

DEPTH = 100
"""Number of labels that are searched for each test query."""
_BLOCK = 128  # Items that the transcription pads to one length.


def check_transcribed(config: ConfigDict) -> None:
  """Checks that the transcription covers a config.

  Raises:
    InputError: Naming the key that it does not cover.
  """
  wanted: dict[str, Any] = {
    "method": "prime",
    "encoder.architecture": "bert",
    "encoder.pooling": "mean",
    "encoder.random_init": False,
    "encoder.projection_dropout": config.encoder.get("dropout"),
    "fusion.method": "early",
    "fusion.adapter": "linear",
    "fusion.residual": 0.0,
    "fusion.modality_dropout": 0.0,
    "prompt.template": "V E",
    "train.classifier_weight": 0.0,
    "train.clip_norm": 0.0,
    "train.decay_layer_norms": False,
    "eval.split": "test",
  }
  found = configuration.flatten_config(config)
  for key, value in wanted.items():
    if found.get(key) != value:
      raise InputError(f"config.{key}={found.get(key)}: the PyTorch transcription needs {value}; set it to that")
  if not config.encoder.num_token_types:
    raise InputError("config.encoder.num_token_types=0: the PyTorch transcription needs BERT or MiniLM, not DistilBERT")


@dataclasses.dataclass(frozen=True)
class Run:
  """A run before its first step, from which both sides start.

  Attributes:
    setup: Config, data, model and row layout.
    queries: Training queries.
    step: What our training step does.
    total_steps: Steps of the whole run.
    state: Our state at step 0.
    frozen: Our parameters that are not trained.
  """

  setup: RunSetup
  queries: TrainingQueries
  step: StepConfig
  total_steps: int
  state: TrainState
  frozen: Tree

  @classmethod
  def start(cls, config: ConfigDict, workdir: Path) -> "Run":
    """Initializes a run as `vixml_jax.main` does."""
    setup = set_up_run(config, workdir, extract=True)
    config, data = setup.config, setup.data
    queries = training_queries(config, data)
    total_steps = config.train.epochs * steps_per_epoch(len(queries), config.train.batch_size)
    step = step_config(config, setup.model, setup.layout, total_steps, data.num_labels)
    abstract = abstract_state(
      setup.model, step.optimizer, len(queries), data.num_labels, config.train.bank_dtype, setup.mesh
    )
    encoder = setup.load_encoder()
    first = initial_checkpoint(
      config, abstract, step.optimizer, queries, encoder, setup.weights_folder, data.fingerprint, has_steps=True
    )
    return cls(setup, queries, step, total_steps, first.state, encoder.frozen)

  @property
  def config(self) -> ConfigDict:
    """The whole config, with everything chosen that depends on the data."""
    return self.setup.config

  @property
  def num_steps(self) -> int:
    """Steps of an epoch."""
    return steps_per_epoch(len(self.queries), self.config.train.batch_size)

  def order(self, epoch: int, clusters: np.ndarray | None) -> np.ndarray:
    """Returns the order in which an epoch reads the queries."""
    return epoch_order(self.config.seed, epoch, len(self.queries), clusters)

  def batch(self, order: np.ndarray, step: int) -> Batch:
    """Returns the batch of a step of the whole run."""
    epoch, step = divmod(step, self.num_steps)
    how = self.config
    return make_batch(
      self.queries, order, how.train.batch_size, self.setup.layout, seed=how.seed, epoch=epoch, step=step
    )

  def drawn_positives(self, batch: Batch, step: int) -> list[np.ndarray]:
    """Returns the positives that our loss draws in a step for its four terms, int32 [B] each."""
    _, _, loss_key = jax.random.split(jax.random.fold_in(self.step.base_key, step), 3)
    positives = [batch.positives, batch.positives, batch.positives.T, batch.positives]
    return [
      np.asarray(draw_positive(key, jax.numpy.asarray(rows)))
      for key, rows in zip(jax.random.split(loss_key, 4), positives, strict=True)
    ]

  def clusters_after(self, epoch: int, clusters: np.ndarray | None, bank: Any) -> np.ndarray | None:
    """Returns the query clusters after an epoch: new ones from the bank where an update is due."""
    mining = self.config.mining
    if not is_cluster_update(epoch, mining.start_epoch, mining.update_epochs):
      return clusters
    size = cluster_size_at(epoch, mining.cluster_size, tuple(mining.doubling_epochs))
    number, seed = num_query_clusters(len(self.queries), size), self.config.seed + epoch
    return balanced_kmeans(bank, number, seed=seed, mesh=self.setup.mesh, num_rows=len(self.queries))

  def centroids(self, embeddings: Any, labels: Ragged) -> jax.Array:
    """Returns label centroids of embedded queries, float32 [L rounded up, D]."""
    return label_centroids(embeddings, labels, self.setup.data.num_labels, mesh=self.setup.mesh)


class JaxTraining:
  """Our side of the comparison of steps."""

  def __init__(self, run: Run):
    self.run, self.state = run, run.state
    self.train_step = make_train_step(run.step, jax.tree.map(_abstract, run.state), run.setup.mesh)

  def step(self, batch: Batch) -> dict[str, float]:
    """Trains on a batch and returns the loss and its terms."""
    on_mesh = device_batch(batch, self.run.setup.data.image_features, self.run.setup.mesh)
    self.state, values = self.train_step(self.state, self.run.frozen, on_mesh)
    return {name: float(value) for name, value in values.items()}

  def losses(self, batch: Batch, numbers: Iterable[int]) -> Iterator[dict[str, float]]:
    """Yields the loss of a batch and its terms for the random numbers of each of some steps, without training."""
    run, mesh = self.run, self.run.setup.mesh

    @jax.jit
    def loss_of(state: TrainState, frozen: Tree, on_mesh: DeviceBatch, number: jax.Array) -> dict[str, jax.Array]:
      key = jax.random.fold_in(run.step.base_key, number)
      return batch_loss(run.step, mesh, join_params(state.params, frozen), state, on_mesh, key)[1][0]

    on_mesh = device_batch(batch, run.setup.data.image_features, mesh)
    for number in numbers:
      values = loss_of(self.state, run.frozen, on_mesh, number)
      yield {name: float(value) for name, value in values.items()}

  def refresh_centroids(self) -> None:
    """Makes label centroids from the bank."""
    centroids = self.run.centroids(self.state.bank, self.run.queries.labels)
    self.state = dataclasses.replace(self.state, centroids=centroids)


class TorchTraining:
  """The transcription's model, optimizer, bank and label centroids."""

  def __init__(self, run: Run):
    self.run, config = run, run.config
    torch.manual_seed(config.seed)
    encoder = transformers.BertModel.from_pretrained(
      run.setup.weights_folder,
      add_pooling_layer=False,
      hidden_dropout_prob=config.encoder.dropout,
      attention_probs_dropout_prob=config.encoder.attention_dropout,
    )
    prototype = config.prototype
    self.model = torch_reference.ReferenceModel(
      encoder, config.features.dim, config.train.free_vectors, prototype.num_heads, prototype.mlp_dim, prototype.dropout
    )
    params = jax.device_get(run.state.params)
    torch_reference.copy_new_parameters(params, self.model)
    train = config.train
    self.optimizer, self.schedule = torch_reference.make_optimizer(
      self.model,
      learning_rate=train.learning_rate,
      new_learning_rate=train.new_learning_rate,
      free_vector_learning_rate=train.free_vector_learning_rate,
      weight_decay=train.weight_decay,
      adam_eps=train.adam_eps,
      warmup_steps=train.warmup_steps,
      total_steps=run.total_steps,
    )
    self.clusters, self.centroids = np.array(run.state.label_clusters), np.array(run.state.centroids)
    self.bank = np.zeros((len(run.queries), encoder.config.hidden_size), np.float32)

  def step(self, batch: Batch, number: int) -> dict[str, float]:
    """Trains on the batch of a step and returns the loss and its terms."""
    parts, queries = self._forward(batch, number)
    self.optimizer.zero_grad()
    parts["loss"].backward()
    self.optimizer.step()
    self.schedule.step()
    self.bank[batch.query_ids[: len(queries)]] = queries.detach().numpy()
    return {name: value.item() for name, value in parts.items()}

  def losses(self, batch: Batch, numbers: Iterable[int]) -> Iterator[dict[str, float]]:
    """Yields the loss of a batch and its terms for the positives of each of some steps, without training."""
    for number in numbers:
      with torch.no_grad():
        parts, _ = self._forward(batch, number)
      yield {name: value.item() for name, value in parts.items()}

  def _forward(self, batch: Batch, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the loss of the batch of a step with its terms, and the embeddings of its queries."""
    self.model.train()
    filled = int(batch.valid.sum())
    query_ids, label_ids = batch.query_ids[:filled], batch.label_ids[:filled]
    query_pooled = self._pool(self.run.queries.items.take(query_ids))
    label_pooled = self._pool(self.run.queries.label_items.take(label_ids))
    queries = functional.normalize(query_pooled, dim=1)
    parts = torch_reference.prime_loss(
      queries,
      functional.normalize(label_pooled, dim=1),
      self._prototypes(label_pooled, label_ids),
      torch.tensor(batch.positives[:filled, :filled]),
      [torch.tensor(drawn[:filled]).long() for drawn in self.run.drawn_positives(batch, number)],
      self.run.step.loss,
    )
    return parts, queries

  def perturb(self) -> None:
    """Changes each parameter at random by about one part in ten million, the size of a rounding error."""
    with torch.no_grad():
      for parameter in self.model.parameters():
        parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))

  def refresh_centroids(self) -> None:
    """Makes label centroids from the bank."""
    self.centroids = np.array(self.run.centroids(self.bank, self.run.queries.labels))

  def pooled(self, items: Items) -> np.ndarray:
    """Returns pooled outputs of items without dropout, float32 [items, D]."""
    self.model.eval()
    with torch.inference_mode():
      return self._pool(items).numpy()

  def evaluate(self) -> dict[str, float]:
    """Returns the metrics on the test split, with centroids from a fresh encoding of all training queries."""
    data, config = self.run.setup.data, self.run.config
    embeddings = _normalized(self.pooled(data.items["train"]))
    self.centroids = np.array(self.run.centroids(embeddings, data.corpus.train_labels))
    pooled = torch.tensor(self.pooled(data.items["labels"]))
    with torch.inference_mode():
      prototypes = self._prototypes(pooled, np.arange(len(pooled))).numpy()
    ids = _search(_normalized(self.pooled(data.items["test"])), prototypes, data.corpus.test_filter, DEPTH)
    propensity = data.inverse_propensity(config.dataset.propensity_a, config.dataset.propensity_b)
    return metrics.evaluate(ids, data.corpus.test_labels, propensity, precision_ks=(1, 3, 5), recall_ks=(10, DEPTH))

  def _pool(self, items: Items) -> torch.Tensor:
    """Returns pooled outputs of items [items, D], encoded in blocks of similar length, which need little padding."""
    order = np.argsort(items.tokens.lengths + items.images.lengths, kind="stable")
    blocks = [order[start : start + _BLOCK] for start in range(0, len(order), _BLOCK)]
    pooled = torch.cat([self.model.pool(self._padded(items.take(rows))) for rows in blocks])
    return pooled[torch.tensor(np.argsort(order))]

  def _prototypes(self, pooled: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    clusters, centroids = torch.tensor(self.clusters[labels]).long(), torch.tensor(self.centroids[labels])
    return self.model.prototypes(pooled, clusters, centroids)

  def _padded(self, items: Items) -> torch_reference.PaddedItems:
    features = self.run.setup.data.image_features
    tokens, token_mask = _pad(items.tokens)
    rows, image_mask = _pad(items.images)
    width = self.run.config.features.dim
    images = np.zeros((*rows.shape, width), np.float32) if features is None else features.values[rows]
    return torch_reference.PaddedItems(
      *(torch.tensor(array) for array in (tokens, token_mask, np.asarray(images, np.float32), image_mask))
    )


def _search(queries: np.ndarray, labels: np.ndarray, excluded: Ragged, depth: int) -> np.ndarray:
  """Returns the most similar labels of each query by comparison with every label, int [Q, depth].

  Args:
    queries: Embeddings of the queries, [Q, D].
    labels: Embeddings of the labels, [L, D].
    excluded: Labels that a query may not have, Q rows.
    depth: Number of labels of a query; places beyond the labels that are left hold -1.
  """
  found = np.full((len(queries), depth), -1)
  for row, query in enumerate(queries):
    scores = labels @ query
    scores[excluded[row]] = -np.inf
    left = np.argsort(-scores, kind="stable")[: min(depth, len(labels) - len(np.unique(excluded[row])))]
    found[row, : len(left)] = left
  return found


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _pad(rows: Ragged) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows of ids padded with 0 on the right, int64 [rows, longest], and which of them exist, bool."""
  lengths = rows.lengths
  mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
  ids = np.zeros(mask.shape, np.int64)
  ids[mask] = rows.values
  return ids, mask


def _normalized(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
