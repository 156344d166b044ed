"""Evaluates a trained model on a split of its data set: encodes, chooses retrieval settings, searches, scores."""

import dataclasses
import logging

from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.evaluation.evaluator import (
  Evaluation,
  EvaluationConfig,
  EvaluationIndex,
  EvaluationQueries,
  choose_retrieval,
  evaluate,
)
from vixml_jax.evaluation.tuning import Setting
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.run.data import RunData
from vixml_jax.run.state import TrainedModel
from vixml_jax.search.retrieval_augmented import RetrievalSettings

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
    pooled_labels: float32 [L, D], pooled encoder outputs of the labels, before normalization.
    train_embeddings: float32 [N, D], embeddings of all training queries.
  """

  result: Evaluation
  config: EvaluationConfig
  tried: list[Setting]
  index: EvaluationIndex
  queries: EvaluationQueries
  pooled_labels: np.ndarray
  train_embeddings: np.ndarray


def evaluate_model(config: ConfigDict, data: RunData, encoder: ItemEncoder, model: TrainedModel) -> ModelEvaluation:
  """Encodes everything that is needed, chooses retrieval settings where asked to, and evaluates `eval.split`.

  Args:
    config: the whole config.
    data: the data set.
    encoder: encodes items, given the trained parameters.
    model: the trained model; its `train_embeddings` are used where it has them.
  """
  wanted, corpus = config.eval, data.corpus
  evaluation = evaluation_config(wanted)
  train_embeddings = model.train_embeddings
  if train_embeddings is None:
    train_embeddings = encoder.embed(model.params, data.items["train"], "training queries")
  pooled = encoder.pooled(model.params, data.items["labels"], "labels")
  propensity = data.inverse_propensity(config.dataset.propensity_a, config.dataset.propensity_b)
  tried: list[Setting] = []
  if chooses_retrieval(wanted) or wanted.split == "validation":
    # Held-out queries are searched against centroids and training queries that do not know them.
    rows, known = data.validation_rows, train_embeddings[data.train_rows]
    centroids = label_centroids(known, data.train_labels, data.num_labels, mesh=encoder.mesh)
    prototypes = encoder.prototypes(model.params, pooled, model.label_clusters, sharding.to_host(centroids))
    index = EvaluationIndex(prototypes, known, data.train_labels, propensity, wanted.search, encoder.mesh)
    queries = EvaluationQueries(train_embeddings[rows], corpus.train_labels.take(rows), corpus.train_filter.take(rows))
  if chooses_retrieval(wanted):
    settings, tried = choose_retrieval(index, queries, wanted.retrieval_hits)
    evaluation = dataclasses.replace(evaluation, retrieval=settings)
    _log.info(
      "retrieval augmentation: lambda %g and temperature %g, best of %d on %d held-out queries",
      settings.lambda_,
      settings.temperature,
      len(tried),
      len(queries.labels),
    )
  if wanted.split == "test":
    prototypes = encoder.prototypes(model.params, pooled, model.label_clusters, model.centroids)
    index = EvaluationIndex(prototypes, train_embeddings, corpus.train_labels, propensity, wanted.search, encoder.mesh)
    queries = EvaluationQueries(
      encoder.embed(model.params, data.items["test"], "test queries"), corpus.test_labels, corpus.test_filter
    )
  result = evaluate(index, queries, evaluation)
  return ModelEvaluation(result, evaluation, tried, index, queries, pooled, train_embeddings)


def evaluate_with_fewer_images(
  config: ConfigDict, data: RunData, encoder: ItemEncoder, model: TrainedModel, evaluation: ModelEvaluation
) -> dict[int, Evaluation]:
  """Returns results on the same queries with at most each number of images of `eval.test_images`."""
  split, rows = data.evaluated_queries(config.eval.split)
  items = data.items[split] if split == "test" else data.items[split].take(rows)
  results = {}
  for count in config.eval.test_images:
    embeddings = encoder.embed(model.params, items.first_images(count), f"queries with {count} images")
    queries = dataclasses.replace(evaluation.queries, embeddings=embeddings)
    results[count] = evaluate(evaluation.index, queries, evaluation.config)
  return results


def all_prototypes(
  config: ConfigDict, encoder: ItemEncoder, model: TrainedModel, evaluation: ModelEvaluation
) -> np.ndarray:
  """Returns the prototypes of all labels with all training queries known, float32 [L, D], whatever was evaluated."""
  if config.eval.split == "test":
    return evaluation.index.prototypes
  return encoder.prototypes(model.params, evaluation.pooled_labels, model.label_clusters, model.centroids)


def evaluation_config(wanted: ConfigDict) -> EvaluationConfig:
  """Returns the evaluation that the section `eval` of a config describes."""
  retrieval = None
  if wanted.retrieval_augmented:
    retrieval = RetrievalSettings(wanted.retrieval_lambda, wanted.retrieval_temperature, wanted.retrieval_hits)
  return EvaluationConfig(tuple(wanted.ks), tuple(wanted.recall_ks), wanted.bootstrap_samples, retrieval)


def chooses_retrieval(wanted: ConfigDict) -> bool:
  """Returns whether lambda and temperature are chosen on held-out queries, by the section `eval` of a config."""
  return wanted.retrieval_augmented and wanted.retrieval_choose
