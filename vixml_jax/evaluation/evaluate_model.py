"""Evaluates a trained model on a split of its data set: encodes, chooses retrieval settings, searches, scores."""

import dataclasses
import functools
import logging
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from vixml_jax.blend.classifiers import fit_classifiers
from vixml_jax.blend.model import BlendModel
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.evaluation.blend_fitting import CorpusWords, FittedBlend, fit_blend, hidden_labels
from vixml_jax.evaluation.evaluator import (
  Evaluation,
  EvaluationConfig,
  EvaluationIndex,
  EvaluationQueries,
  choose_retrieval,
  evaluate,
)
from vixml_jax.evaluation.label_vectors import ClassifierMix, choose_share, mix_of
from vixml_jax.evaluation.small_vectors import chosen_dims, evaluate_small_vectors
from vixml_jax.evaluation.tuning import Setting
from vixml_jax.mining.centroids import cluster_means, label_centroids
from vixml_jax.ragged import Ragged
from vixml_jax.run.data import RunData
from vixml_jax.run.from_config import chooses_retrieval
from vixml_jax.run.state import TrainedModel
from vixml_jax.search.retrieval_augmented import RetrievalSettings
from vixml_jax.search.scann_recall import QuerySample, RecallGoal, sample_rows
from vixml_jax.sharded_rows import ShardedRows

LEAST_HELD_OUT_TO_FIT_AGAIN = 0.01
"""Share of held-out queries from which classifiers are fitted again on all training queries before the test."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelEvaluation:
  """The evaluation of a model, and the embeddings behind it, which later outputs reuse.

  Attributes:
    result: the results.
    config: how the model was evaluated, with the retrieval settings that were chosen.
    tried: the retrieval settings that were tried on held-out queries; empty where none were chosen.
    index: the labels and training queries that were searched.
    queries: the queries that were evaluated.
    train_embeddings: [N, D], embeddings of all training queries.
    pooled_labels: [L, D], pooled encoder outputs of the labels, if the prototypes of the index do not know all training
      queries; None otherwise.
    cluster_means: [C, D], mean embedding of the labels of each free vector; None for a model without free vectors.
    blend: the trained blend; None if none was fitted.
    mix: how the vectors of labels contain classifiers; None for prototypes alone.
  """

  result: Evaluation
  config: EvaluationConfig
  tried: list[Setting]
  index: EvaluationIndex
  queries: EvaluationQueries
  train_embeddings: ShardedRows
  pooled_labels: ShardedRows | None
  cluster_means: ShardedRows | None
  blend: FittedBlend | None
  mix: ClassifierMix | None


def evaluate_model(config: ConfigDict, data: RunData, encoder: ItemEncoder, model: TrainedModel) -> ModelEvaluation:
  """Encodes everything that is needed, chooses retrieval settings where asked to, and evaluates `eval.split`.

  All embeddings stay on the devices. What held-out queries need comes first and is freed before the test queries.

  Args:
    config: the whole config.
    data: the data set.
    encoder: encodes items, given the trained parameters.
    model: the trained model; its `train_embeddings` are used where it has them.
  """
  wanted = config.eval
  evaluation = evaluation_config(wanted)
  train_embeddings = model.train_embeddings
  if train_embeddings is None:
    train_embeddings = encoder.embed_rows(model.params, data.items["train"], "training queries")
  pooled = encoder.pool_rows(model.params, data.items["labels"], "labels")
  propensity = data.inverse_propensity(config.dataset.propensity_a, config.dataset.propensity_b)
  make_index = functools.partial(
    EvaluationIndex,
    train_embeddings=train_embeddings,
    train_labels=data.corpus.train_labels,
    inverse_propensity=propensity,
    search=wanted.search,
    mesh=encoder.mesh,
  )
  tried: list[Setting] = []
  known = data.known
  blend = wanted.blend and wanted.split == "test"
  if wanted.blend and not blend:
    _log.info("no row for the blend: it is fitted on the held-out queries, which are evaluated")
  words = CorpusWords.read(data.corpus, known) if blend else None
  blend_model: BlendModel | None = None
  classifiers: ShardedRows | None = None
  mix: ClassifierMix | None = None
  if chooses_retrieval(config) or words is not None or wanted.split == "validation":
    prototypes = _held_out_prototypes(data, encoder, model, pooled, train_embeddings, known)
    rows = data.validation_rows
    queries = EvaluationQueries(
      train_embeddings.select(rows),
      data.corpus.train_labels.take(rows),
      data.corpus.train_filter.take(rows),
      None if words is None else words.train[rows],
    )
    if words is not None and wanted.classifier_epochs:
      classifiers = _fit_classifiers(config, train_embeddings, data.corpus.train_labels.keep(known), data.num_labels)
      mix = _classifier_mix(wanted, prototypes, classifiers, queries, propensity)
    index = make_index(
      _label_vectors(prototypes, classifiers, mix, hidden_labels(data.num_labels)),
      train_labels=data.corpus.train_labels.keep(known),
      known=None if known.all() else known,
      goal=_goal(wanted, queries),
    )
    if chooses_retrieval(config):
      assert evaluation.retrieval is not None
      settings, tried = choose_retrieval(index, queries, evaluation.retrieval)
      evaluation = dataclasses.replace(evaluation, retrieval=settings)
      _log.info(
        "retrieval augmentation: lambda %g and temperature %g, best of %d on %d held-out queries",
        settings.lambda_,
        settings.temperature,
        len(tried),
        len(queries),
      )
    if words is not None:
      blend_model = fit_blend(index, words.index(data.corpus.train_labels, classifiers, known), queries)
    del prototypes
    if wanted.split == "test":
      del index, queries  # Frees what held-out queries needed.
  means = _cluster_means(config, model, pooled)
  fitted: FittedBlend | None = None
  if wanted.split == "test":
    if classifiers is not None and len(data.validation_rows) >= LEAST_HELD_OUT_TO_FIT_AGAIN * len(data.train_rows):
      classifiers = None  # Frees its memory.
      classifiers = _fit_classifiers(config, train_embeddings, data.corpus.train_labels, data.num_labels)
    prototypes = encoder.prototype_rows(model.params, pooled, model.label_clusters, model.centroids, donate=True)
    index = make_index(_label_vectors(prototypes, classifiers, mix))
    del prototypes
    queries = EvaluationQueries(
      encoder.embed_rows(model.params, data.items["test"], "test queries"),
      data.corpus.test_labels,
      data.corpus.test_filter,
      None if words is None else words.test(data.corpus),
    )
    index = dataclasses.replace(index, goal=_goal(wanted, queries))
    if blend_model is not None:
      assert words is not None
      fitted = FittedBlend(blend_model, words, classifiers)
      index = dataclasses.replace(index, blend=fitted.ranker(data.corpus.train_labels))
  result = evaluate(index, queries, evaluation)
  left = None if wanted.split == "test" else pooled
  return ModelEvaluation(result, evaluation, tried, index, queries, train_embeddings, left, means, fitted, mix)


def final_metrics(evaluation: ModelEvaluation, small: dict[str, dict[str, float]]) -> dict[str, Any]:
  """Returns the contents of final_metrics.json without times.

  Args:
    evaluation: The evaluation of the model.
    small: Metrics of smaller vectors (`small_vector_metrics`).
  """
  final = evaluation.result.final_metrics()
  settings = evaluation.config.retrieval
  if settings is not None:
    final |= {"RA/lambda": settings.lambda_, "RA/temperature": settings.temperature}
  if evaluation.mix is not None:
    final |= {"classifier_share": evaluation.mix.share}
  return final | {f"{form}/{name}": value for form, metrics in small.items() for name, value in metrics.items()}


def small_vector_metrics(evaluation: ModelEvaluation, config: ConfigDict) -> dict[str, dict[str, float]]:
  """Returns the metrics of plain search with smaller vectors (`eval.small_vectors`), by name of the form."""
  dims = chosen_dims(config.eval.small_vectors, config.train.matryoshka_dims)
  index = evaluation.index
  return evaluate_small_vectors(dims, index.label_vectors, evaluation.queries, index.inverse_propensity)


def _fit_classifiers(
  config: ConfigDict, train_embeddings: ShardedRows, labels_of_queries: Ragged, num_labels: int
) -> ShardedRows:
  """Returns classifiers of all labels, given the labels of the training queries that they may know."""
  return fit_classifiers(
    train_embeddings,
    labels_of_queries,
    num_labels,
    epochs=config.eval.classifier_epochs,
    seed=config.seed,
    dims=tuple(config.train.matryoshka_dims),
  )


def _classifier_mix(
  wanted: ConfigDict,
  prototypes: ShardedRows,
  classifiers: ShardedRows,
  held_out: EvaluationQueries,
  propensity: np.ndarray,
) -> ClassifierMix | None:
  """Returns the mix of `eval.classifier_share`, or the best one where it is -1; None for a share of 0."""
  if not wanted.classifier_share:
    return None
  if wanted.classifier_share > 0:
    return mix_of(wanted.classifier_share, prototypes, classifiers, held_out)
  mix, tried = choose_share(prototypes, classifiers, held_out, propensity)
  _log.info(
    "plain search: share %g of classifiers in the vectors of labels; P@1 on held-out queries by share: %s",
    mix.share,
    ", ".join(f"{setting.share:g}: {setting.metrics['P@1']:.2f}" for setting in tried),
  )
  return mix if mix.share else None


def _label_vectors(
  prototypes: ShardedRows, classifiers: ShardedRows | None, mix: ClassifierMix | None, hidden: np.ndarray | None = None
) -> ShardedRows:
  """Returns the vectors of labels; without a mix, they are the prototypes."""
  if mix is None:
    return prototypes
  assert classifiers is not None
  return mix.vectors(prototypes, classifiers, hidden)


def _goal(wanted: ConfigDict, queries: EvaluationQueries) -> RecallGoal | None:
  """Returns the recall that ScaNN must reach, on queries that were not trained on; their labels are not used.

  Args:
    wanted: the section `eval` of a config.
    queries: the held-out or test queries.
  """
  if not wanted.scann_recall:
    return None
  assert isinstance(queries.embeddings, ShardedRows)
  rows = sample_rows(len(queries))
  return RecallGoal(wanted.scann_recall, QuerySample(np.asarray(queries.embeddings.take(rows)), "held-out queries"))


def _held_out_prototypes(
  data: RunData,
  encoder: ItemEncoder,
  model: TrainedModel,
  pooled: ShardedRows,
  train_embeddings: ShardedRows,
  known: np.ndarray,
) -> ShardedRows:
  """Returns the prototypes of all labels whose centroids do not know the held-out queries."""
  centroids = model.centroids
  if encoder.model.has_centroids:
    centroids = label_centroids(train_embeddings.values, data.corpus.train_labels.keep(known), data.num_labels)
  return encoder.prototype_rows(model.params, pooled, model.label_clusters, centroids)


def _cluster_means(config: ConfigDict, model: TrainedModel, pooled: ShardedRows) -> ShardedRows | None:
  """Returns the mean embedding of the labels of each free vector."""
  if "free_vectors" not in model.params:
    return None
  number = config.train.free_vectors
  return ShardedRows(cluster_means(pooled.values, model.label_clusters, number, normalized=True), number)


def evaluate_with_fewer_images(
  config: ConfigDict, data: RunData, encoder: ItemEncoder, model: TrainedModel, evaluation: ModelEvaluation
) -> dict[int, Evaluation]:
  """Returns results on the same queries with at most each number of images of `eval.test_images`."""
  split, rows = data.evaluated_queries(config.eval.split)
  items = data.items[split] if split == "test" else data.items[split].take(rows)
  results = {}
  for count in config.eval.test_images:
    embeddings = encoder.embed_rows(model.params, items.first_images(count), f"queries with {count} images")
    queries = dataclasses.replace(evaluation.queries, embeddings=embeddings)
    results[count] = evaluate(evaluation.index, queries, evaluation.config)
  return results


def all_label_vectors(encoder: ItemEncoder, model: TrainedModel, evaluation: ModelEvaluation) -> ShardedRows:
  """Returns the vectors of all labels with all training queries known, [L, D], whatever was evaluated.

  The memory of `evaluation.pooled_labels` is reused.
  """
  if evaluation.pooled_labels is None:
    assert isinstance(evaluation.index.label_vectors, ShardedRows)
    return evaluation.index.label_vectors
  return encoder.prototype_rows(
    model.params, evaluation.pooled_labels, model.label_clusters, model.centroids, donate=True
  )


def evaluation_config(wanted: ConfigDict) -> EvaluationConfig:
  """Returns the evaluation that the section `eval` of a config describes."""
  retrieval = retrieval_settings(wanted) if wanted.retrieval_augmented else None
  return EvaluationConfig(tuple(wanted.ks), tuple(wanted.recall_ks), wanted.bootstrap_samples, retrieval)


def retrieval_settings(wanted: ConfigDict) -> RetrievalSettings:
  """Returns the settings of retrieval augmentation that the section `eval` of a config has."""
  return RetrievalSettings(
    wanted.retrieval_lambda,
    wanted.retrieval_temperature,
    wanted.retrieval_hits,
    wanted.retrieval_query_hits,
    wanted.retrieval_search == "joint",
  )
