"""The programs of a run in the order in which they first run: what each computes, and what is in memory meanwhile.

The list follows `training.start`, `training.loop` and `evaluation.evaluate_model`. A test compares it with what a run
compiles. It leaves out programs that fill an array with zeros, copy one, or copy a block to the host: the arrays count
as held by the programs that use them.
"""

from collections.abc import Iterator
import math
from typing import Any

import jax
import numpy as np
import optax

from vixml_jax import sharded_rows, sharding
from vixml_jax.ahead_of_time.plan import Plan, bytes_a_chip
from vixml_jax.ahead_of_time.program_parts import ProgramParts, RunProgram, Work
from vixml_jax.ahead_of_time.workload import item_lengths
from vixml_jax.blend import classifiers
from vixml_jax.evaluation import label_vectors
from vixml_jax.evaluation.evaluator import MOST_HELD_OUT
from vixml_jax.mining.order import cluster_size_at, is_cluster_update, num_query_clusters
from vixml_jax.rounding import next_power_of_two
from vixml_jax.run.from_config import chooses_retrieval
from vixml_jax.run.state import init_program, start_program
from vixml_jax.training.optimizer import optimizer_from_config
from vixml_jax.training.step import make_train_step, step_config

TRAIN_STEP = "train step"
ENCODE_STEP = "encode training queries at the end"


def run_programs(plan: Plan) -> list[RunProgram]:
  """Returns the programs that a run of a plan compiles."""
  return list(_Run(plan).programs())


class _Run:
  """Lists the programs of a run and follows what is in memory.

  Args:
    plan: The plan.
  """

  def __init__(self, plan: Plan):
    self._plan, self._mesh = plan, plan.mesh
    self._config, self._size, self._model = plan.workload.config, plan.workload.size, plan.workload.model
    self._parts = ProgramParts(plan)
    self._params = bytes_a_chip(plan.state.params)
    # The parameters and the image features never leave the chips.
    self._always = self._params + bytes_a_chip(plan.frozen) + bytes_a_chip(plan.batch.image_features)
    self._centroids = bytes_a_chip(plan.state.centroids)
    self._tests = plan.rows(max(self._size.test, 1))

  def programs(self) -> Iterator[RunProgram]:
    """Yields the programs."""
    yield from self._start()
    yield from self._training()
    yield from self._evaluation()

  def _start(self) -> Iterator[RunProgram]:
    """Yields the programs before the first step."""
    config, held = self._config, self._always
    optimizer = optimizer_from_config(config, self._model, self._plan.workload.steps)
    key = jax.eval_shape(lambda: jax.random.key(0))
    yield RunProgram(
      "make new parameters",
      lambda: init_program(self._model, self._mesh, lambda tree: self._model.split_base(tree)[0]).lower(key),
      held,
      1,
    )
    if config.encoder.random_init:
      yield RunProgram(
        "make a random encoder",
        lambda: init_program(self._model, self._mesh, lambda tree: self._model.split_base(tree)[1]).lower(key),
        held,
        1,
      )
    if self._model.has_free_vectors:
      yield from self._label_clusters(held)
    if self._model.has_centroids:
      yield from self._parts.encode("encode training queries at the start", self._size.train, held)
      embedded = held + bytes_a_chip(self._parts.queries)
      yield from self._parts.means("label centroids at the start", self._parts.queries, self._size.labels, embedded)
    yield RunProgram(
      "make the train state",
      lambda: start_program(self._plan.state, optimizer).lower(self._plan.state.params),
      held + self._centroids,
      1,
    )

  def _label_clusters(self, held: float) -> Iterator[RunProgram]:
    """Yields the programs that choose the free vector of each label."""
    train, num_labels = self._config.train, self._size.labels
    own, from_embeddings = train.free_vectors >= num_labels, train.free_vector_init == "cluster_mean"
    if own and not from_embeddings:
      return
    yield from self._parts.encode("encode labels at the start", num_labels, held)
    embedded = held + bytes_a_chip(self._parts.labels)
    if not own:
      yield self._parts.kmeans("cluster labels", self._parts.labels, train.free_vectors, num_labels, embedded, 1)
    if from_embeddings:
      yield from self._parts.means(
        "free vectors", self._parts.labels, train.free_vectors, embedded, num_rows=train.free_vectors, pairs=num_labels
      )

  def _training(self) -> Iterator[RunProgram]:
    """Yields the programs of the epochs, and of their end."""
    config, plan, batch = self._config, self._plan, self._plan.workload.batch
    lengths = item_lengths(batch.items.segments)
    how = step_config(config, self._model, plan.workload.layout, plan.workload.steps, self._size.labels)
    yield RunProgram(
      TRAIN_STEP,
      lambda: make_train_step(how, plan.state, self._mesh).lower(*plan.train_arguments),
      bytes_a_chip(plan.train_arguments),
      plan.workload.steps,
      Work(len(lengths), float(lengths.sum()), lengths, trains=True),
    )
    held = bytes_a_chip(plan.state) - self._params + self._always
    bank = plan.rows(self._size.train, config.train.bank_dtype)
    clusters, updates = self._query_clusters()
    if updates:
      yield self._parts.kmeans(f"cluster queries into {clusters:,}", bank, clusters, self._size.train, held, updates)
    if self._model.has_centroids and config.train.epochs > 1:
      yield from self._parts.means(
        "label centroids from the bank", bank, self._size.labels, held, times=config.train.epochs - 1
      )
    yield from self._parts.encode(ENCODE_STEP, self._size.train, held)
    if self._model.has_centroids:
      yield from self._parts.means(
        "label centroids at the end", self._parts.queries, self._size.labels, held + bytes_a_chip(self._parts.queries)
      )

  def _query_clusters(self) -> tuple[int, int]:
    """Returns the largest number of clusters of queries, and how often queries are clustered.

    The programs of smaller numbers need less memory, and less time. Compiling each of them takes minutes.
    """
    mining = self._config.mining
    numbers = [
      num_query_clusters(self._size.train, cluster_size_at(epoch, mining.cluster_size, tuple(mining.doubling_epochs)))
      for epoch in range(self._config.train.epochs)
      if is_cluster_update(epoch, mining.start_epoch, mining.update_epochs)
    ]
    numbers = [number for number in numbers if number > 1]  # One cluster needs no program.
    return max(numbers, default=1), len(numbers)

  def _evaluation(self) -> Iterator[RunProgram]:
    """Yields the programs of the evaluation, which has the embeddings of the training queries."""
    config, size, pooled = self._config, self._size, bytes_a_chip(self._parts.labels)
    clusters = bytes_a_chip(self._plan.state.label_clusters)
    held = self._always + self._centroids + bytes_a_chip(self._parts.queries)
    if config.eval.every_epochs:  # Training is not over, so its state is in memory.
      held = bytes_a_chip(self._plan.state) - self._params + self._always + bytes_a_chip(self._parts.queries)
    yield from self._parts.encode("encode labels", size.labels, held, normalized=False)
    if chooses_retrieval(config) or config.eval.split == "validation":
      yield from self._held_out(held + pooled)
    if self._model.has_free_vectors:
      number = config.train.free_vectors
      yield from self._parts.means(
        "means of label clusters",
        self._parts.labels,
        number,
        held + pooled,
        num_rows=number,
        pairs=size.labels,
        normalized=True,
      )
      held += bytes_a_chip(self._plan.array((number, self._model.embed_dim), np.float32, "label", "vector"))
    if config.eval.split == "test":
      yield self._parts.prototypes("prototypes", held + pooled + clusters)
      tested = 1 + len(config.eval.test_images)
      yield from self._parts.encode("encode test queries", size.test, held + pooled, times=tested)
      held += bytes_a_chip(self._tests) * min(tested, 2)
      yield from self._parts.search(held + pooled, size.test * tested, self._tests, masked=False, prefix="")

  def _held_out(self, held: float) -> Iterator[RunProgram]:
    """Yields the programs of held-out queries, whose labels have centroids and prototypes of their own."""
    config = self._config
    number = max(round(self._size.train * config.dataset.validation_fraction), 1)
    queries, clusters = self._plan.rows(number), bytes_a_chip(self._plan.state.label_clusters)
    prototypes = bytes_a_chip(self._parts.labels)
    if self._model.has_centroids:
      yield from self._parts.means(
        "label centroids without held-out queries", self._parts.queries, self._size.labels, held
      )
    yield self._parts.prototypes("prototypes without held-out queries", held + self._centroids + prototypes + clusters)
    block = min(sharded_rows.BLOCK_ROWS, number)
    ids = self._plan.array((block,), np.int32)
    values = self._plan.array((block, self._model.embed_dim), np.float32)
    held += prototypes + bytes_a_chip(queries)
    blocks = math.ceil(number / block)
    yield RunProgram(
      "read held-out queries",
      lambda: sharded_rows.take_program.lower(self._parts.queries, ids, mesh=self._mesh),
      held + bytes_a_chip(ids),
      blocks,
    )
    yield RunProgram(
      "write held-out queries",
      lambda: sharded_rows.put_program.lower(queries, ids, values, mesh=self._mesh),
      held + bytes_a_chip((ids, values)),
      blocks,
    )
    if config.eval.blend and config.eval.classifier_epochs:
      yield self._classifiers(held)
      if config.eval.classifier_share:
        yield self._label_vectors(held)
    searched = number if config.eval.split == "validation" else 0
    searched += min(number, MOST_HELD_OUT) if chooses_retrieval(config) else 0
    yield from self._parts.search(held, searched, queries, masked=True, prefix="held out: ")

  def _label_vectors(self, held: float) -> RunProgram:
    """Returns the program that adds classifiers to the prototypes of labels."""
    labels, dim = sharding.padded_rows(self._size.labels), self._model.embed_dim
    prototypes, rows = (self._plan.array((labels, width), np.float32, "query", "vector") for width in (dim, dim + 1))
    hidden = self._plan.array((labels,), np.bool_, "label")
    offset, scales = self._plan.array((dim,), np.float32), self._plan.array((2,), np.float32)
    return RunProgram(
      "add classifiers to prototypes",
      lambda: label_vectors.add_classifiers.lower(prototypes, rows, hidden, offset, scales),
      held + bytes_a_chip((rows, hidden)),
      len(label_vectors.SHARES) + 1 if self._config.eval.classifier_share < 0 else 2,
    )

  def _classifiers(self, held: float) -> RunProgram:
    """Returns the program that trains the classifiers of labels."""
    shape = (sharding.padded_rows(self._size.labels), self._model.embed_dim + 1)
    rows: Any = self._plan.array(shape, np.float32, "query", "vector")
    adam = optax.ScaleByAdamState(self._plan.array((), np.int32), rows, rows)
    size = min(classifiers.BATCH_SIZE, next_power_of_two(self._size.train))
    arguments = (
      classifiers.ClassifierState(rows, adam),
      self._parts.queries,
      self._plan.array((size,), np.int32),
      self._plan.array((size, next_power_of_two(round(self._size.labels_per_query))), np.int32),
      self._plan.array((), np.float32),
    )
    return RunProgram(
      "train classifiers",
      lambda: classifiers.classifier_step.lower(
        *arguments, num_labels=self._size.labels, mesh=self._mesh, dims=tuple(self._config.train.matryoshka_dims)
      ),
      held + bytes_a_chip(arguments[0]),
      self._config.eval.classifier_epochs * math.ceil(self._size.train / size),
    )
