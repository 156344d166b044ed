"""Our side of rows with text encoders: models, batches of synthetic titles, training steps, needed operations."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bench.data import MEAN, random_tokens
from configs.encoders import ENCODERS
from vixml_jax import sharding
from vixml_jax.input.batches import Batch, TrainingQueries, make_batch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.losses import LossConfig, draw_positive
from vixml_jax.models.definition import ModelDefinition, define_model
from vixml_jax.models.lora import split_lora
from vixml_jax.models.parameters import join_params
from vixml_jax.ragged import Ragged
from vixml_jax.run.state import abstract_state, create_state, init_params
from vixml_jax.training.optimizer import make_optimizer
from vixml_jax.training.step import StepConfig, batch_loss, device_batch, make_train_step
from vixml_jax.weights import engine

LEARNING_RATES = {"learning_rate": 1e-4, "new_learning_rate": 1e-4, "free_vector_learning_rate": 1e-4}
"""Learning rates of both sides."""
SCHEDULE = {"weight_decay": 0.01, "adam_eps": 1e-6, "warmup_steps": 0, "total_steps": 1000}
"""Other settings of the optimizer of both sides."""
_TINY_BERT = dict(num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64)
_TINY_DECODER = dict(vocab_size=512, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64)
_NOT_ARGUMENTS = ("architecture", "pooling", "pretrained", "random_init", "adapter")
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "projection_dropout": 0.0}
_ADAPTER_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class TextModel:
  """A dual encoder of texts with random values.

  Attributes:
    encoder: Arguments of the encoder.
    architecture: As in `define_model`.
    pooling: As in `define_model`.
    free_vectors: Number of free vectors.
  """

  encoder: dict[str, Any]
  architecture: str
  pooling: str
  free_vectors: int = 128

  @classmethod
  def of(cls, name: str, **changes: Any) -> "TextModel":
    """Returns the encoder with this name in `configs/encoders.py`, or "tiny-bert" or "tiny-decoder", with changes."""
    tiny = {"tiny-bert": ("minilm-l6", _TINY_BERT), "tiny-decoder": ("qwen2.5-tiny", _TINY_DECODER)}
    base, sizes = tiny.get(name, (name, {}))
    found = ENCODERS[base] | sizes | changes
    left_out = (*_NOT_ARGUMENTS, *(("base_dtype",) if found["architecture"] == "bert" else ()))
    arguments = {key: value for key, value in found.items() if key not in left_out}
    if "rope_scaling" in arguments:  # Configs have an empty tuple for none.
      arguments["rope_scaling"] = arguments["rope_scaling"] or None
    return cls(arguments, found["architecture"], found["pooling"])

  def definition(self, dropout: bool = True) -> ModelDefinition:
    """Returns the definition of the model, with the dropout of its encoder or without any."""
    changes = {} if dropout else {name: rate for name, rate in _NO_DROPOUT.items() if name in self.encoder}
    prototype = {} if dropout else {"dropout": 0.0}
    return define_model(
      self.encoder | changes, prototype, self.free_vectors, architecture=self.architecture, pooling=self.pooling
    )

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """One device, as the peers have."""
    return sharding.make_mesh(devices=jax.devices()[:1])

  @functools.cached_property
  def params(self) -> Any:
    """Random parameters. The second matrices of adapters, which start as zeros, are random as well."""
    params = init_params(self.definition(), self.mesh, seed=0)
    base, adapters = split_lora(params)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(adapters)) + 1))

    def draw(leaf: jax.Array) -> jax.Array:
      # With the sharding of the step's results: another one would compile the step again in the next round.
      return jax.device_put(_ADAPTER_DEVIATION * jax.random.normal(next(keys), leaf.shape, leaf.dtype), leaf.sharding)

    adapters = jax.tree.map(draw, adapters)
    return join_params(base, adapters)

  def forward_flops(self, lengths: np.ndarray) -> float:
    """Returns the operations of the matrix products of a forward pass over texts of these lengths."""
    return sum(self._flops(lengths))

  def training_flops(self, lengths: np.ndarray) -> float:
    """Returns the operations of a forward and a backward pass; frozen kernels need no gradients of their own."""
    kernels, adapters, scores = self._flops(lengths)
    return (2 if self.encoder.get("lora_rank") else 3) * kernels + 3 * (adapters + scores)

  def _flops(self, lengths: np.ndarray) -> tuple[float, float, float]:
    """Returns the operations of kernels, of adapters, and of attention scores and mixing in a forward pass."""
    base, adapters = split_lora(self.definition().shapes["encoder"]["layers"])
    flat = engine.flatten_tree(base)
    kernels = sum(float(np.prod(leaf.shape)) for path, leaf in flat.items() if path.endswith("kernel"))
    of_adapters = sum(float(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapters))
    tokens, squares = float(lengths.sum()), float(np.square(lengths, dtype=np.float64).sum())
    head_dim = self.encoder.get("head_dim", self.encoder["embed_dim"] // self.encoder["num_heads"])
    width = self.encoder["num_layers"] * self.encoder["num_heads"] * head_dim
    return 2 * tokens * kernels, 2 * tokens * of_adapters, 4 * squares * width


@dataclasses.dataclass(frozen=True)
class TrainingData:
  """Batches of synthetic titles, the same for all sides.

  Attributes:
    queries: Training queries and labels.
    layout: Shape of packed rows.
    batches: The batches; a round takes the batch of its number, again from the first one after the last.
  """

  queries: TrainingQueries
  layout: PackedLayout
  batches: list[Batch]

  @classmethod
  def make(
    cls,
    vocab_size: int,
    batch_size: int,
    row_length: int,
    chunk_rows: int = 0,
    positives: int = 2,
    batches: int = 3,
    mean: int = MEAN,
  ) -> "TrainingData":
    """Makes batches of `batch_size` queries, each of which has a number of positives; texts have `mean` tokens.

    With `chunk_rows` of 0, a batch is one chunk, of as many rows as the largest batch needs.
    """
    count = batch_size * batches
    labels = (np.arange(count)[:, None] + np.arange(positives)) % count
    queries = TrainingQueries(
      Items.of_texts(random_tokens(count, vocab_size, 1, mean)),
      Ragged.from_rows(list(np.sort(labels, axis=1))),
      Items.of_texts(random_tokens(count, vocab_size, 2, mean)),
      np.ones(count),
    )

    def packed(rows: int) -> list[Batch]:
      layout = PackedLayout(row_length, rows)
      return [
        make_batch(queries, np.arange(count), batch_size, layout, seed=0, epoch=0, step=step) for step in range(batches)
      ]

    chunk_rows = chunk_rows or max(int(batch.items.filled.sum()) for batch in packed(1))
    return cls(queries, PackedLayout(row_length, chunk_rows), packed(chunk_rows))

  def batch(self, number: int) -> Batch:
    """Returns the batch of a round."""
    return self.batches[number % len(self.batches)]

  def tokens(self, number: int) -> tuple[Ragged, Ragged]:
    """Returns the token ids of the queries and of the labels of the batch of a round."""
    batch = self.batch(number)
    return self.queries.items.tokens.take(batch.query_ids), self.queries.label_items.tokens.take(batch.label_ids)

  def lengths(self) -> np.ndarray:
    """Returns the numbers of tokens of the items of the first batch, int [2 B]."""
    return np.concatenate([part.lengths for part in self.tokens(0)])


class OurTraining:
  """Our training step with the loss of PRIME.

  Attributes:
    loss: Loss of the first batch without dropout, at the initial parameters.
  """

  def __init__(self, model: TextModel, data: TrainingData):
    self._data, self._mesh = data, model.mesh
    definition = model.definition()
    optimizer = make_optimizer(definition.split(definition.shapes)[0], **LEARNING_RATES, **SCHEDULE)
    num_labels = len(data.queries.label_items)
    abstract = abstract_state(definition, optimizer, len(data.queries), num_labels, "float32", self._mesh)
    trained, self._frozen = definition.split(model.params)
    # The step reuses the memory of its state, and the parameters belong to all sides.
    self._state = create_state(abstract, jax.tree.map(jnp.copy, trained), optimizer)
    self._step = make_train_step(_step_config(definition, optimizer, data.layout), abstract, self._mesh)
    plain = _step_config(model.definition(dropout=False), optimizer, data.layout)
    first = device_batch(data.batch(0), None, self._mesh)
    loss = jax.jit(
      lambda params, state, batch: batch_loss(plain, self._mesh, params, state, batch, _first_key(plain))[0]
    )
    self.loss = float(loss(model.params, self._state, first))

  def step(self, number: int) -> float:
    """Trains on the batch of a round and returns its loss."""
    batch = device_batch(self._data.batch(number), None, self._mesh)
    self._state, metrics = self._step(self._state, self._frozen, batch)
    jax.block_until_ready(self._state)
    return float(metrics["loss"])


def _step_config(
  definition: ModelDefinition, optimizer: optax.GradientTransformation, layout: PackedLayout
) -> StepConfig:
  return StepConfig(definition, optimizer, layout, LossConfig(), seed=0, rng_impl="threefry2x32", remat=False)


def _first_key(config: StepConfig) -> jax.Array:
  return jax.random.fold_in(config.base_key, 0)


def drawn_positives(data: TrainingData) -> list[np.ndarray]:
  """Returns the positives that `OurTraining.loss` draws for the four terms of the loss, int32 [B] each."""
  _, _, key = jax.random.split(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 0), 3)
  positives = jnp.asarray(data.batch(0).positives)
  rows = [positives, positives, positives.T, positives]
  return [np.asarray(draw_positive(part, which)) for part, which in zip(jax.random.split(key, 4), rows, strict=True)]
