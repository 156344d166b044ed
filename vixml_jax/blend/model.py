"""The model of the blend: gradient-boosted trees that turn the features of a candidate into a probability.

It is the mean of five models that differ in the features that each tree may use, which lowers the variance of fitting
on a few hundred queries (bagging, Breiman 1996). Most candidates are unlikely. These only pass the first model, so that
five models cost little more than one (a cascade, Viola and Jones, CVPR 2001).
"""

import re

import numpy as np

from vixml_jax.blend.features import CLASSIFIER_FEATURES, FEATURES
from vixml_jax.blend.libraries import import_library
from vixml_jax.errors import InputError

NUM_MODELS, NUM_ROUNDS = 5, 150
LEAST_FOR_ALL = 0.02
"""Probability by the first model from which a candidate also passes the others."""
_PARAMETERS = {
  "objective": "binary",
  # Chosen on held-out queries (docs/results.md).
  "learning_rate": 0.07,
  "num_leaves": 31,
  "min_data_in_leaf": 20,
  "feature_fraction": 0.5,
  # The same trees for the same data and number of threads: LightGBM, "deterministic".
  "deterministic": True,
  "force_row_wise": True,
  "verbosity": -1,
}
_MODEL_STARTS = re.compile(r"^(?=tree\nversion=)", re.MULTILINE)


class BlendModel:
  """A trained model: one or more models in the text format of LightGBM (Ke et al., NeurIPS 2017), one after another.

  Attributes:
    text: The models; `BlendModel(text)` gives the same probabilities, bit for bit.
    uses_classifiers: Whether its features include those of classifiers.
  """

  def __init__(self, text: str):
    """Reads a model.

    Raises:
      InputError: The text is damaged or has other features, or LightGBM is not installed.
    """
    lightgbm = import_library("lightgbm")
    try:
      self._boosters = [lightgbm.Booster(model_str=part) for part in _MODEL_STARTS.split(text) if part.strip()]
    except lightgbm.basic.LightGBMError as error:
      raise InputError(f"the model of the blend cannot be read ({error}); run python -m vixml_jax.evaluate") from error
    names = {tuple(booster.feature_name()) for booster in self._boosters}
    if names not in ({FEATURES}, {FEATURES + CLASSIFIER_FEATURES}):
      raise InputError("the model of the blend has other features than this version; run python -m vixml_jax.evaluate")
    self.text = text
    self.uses_classifiers = names != {FEATURES}

  @classmethod
  def fit(cls, features: np.ndarray, hits: np.ndarray, num_threads: int = 0) -> "BlendModel":
    """Trains a model.

    Args:
      features: Features of the candidates of held-out queries, float32 [P, V], with or without those of classifiers.
      hits: Whether each candidate is a positive of its query, bool [P].
      num_threads: Number of threads; 0 for as many as OpenMP chooses. The trees do not depend on it.

    Raises:
      InputError: All candidates are positives, or none is.
    """
    if hits.all() or not hits.any():
      raise InputError(
        f"the blend cannot be trained: {int(hits.sum())} of the {len(hits)} candidates of held-out queries are "
        "positives; set config.dataset.validation_fraction higher, or config.eval.blend=False"
      )
    lightgbm = import_library("lightgbm")
    names = (FEATURES + CLASSIFIER_FEATURES)[: features.shape[1]]
    data = lightgbm.Dataset(features, hits.astype(np.float32), feature_name=list(names))
    boosters = [
      lightgbm.train(_PARAMETERS | {"seed": seed, "num_threads": num_threads}, data, num_boost_round=NUM_ROUNDS)
      for seed in range(NUM_MODELS)
    ]
    return cls("\n".join(booster.model_to_string() for booster in boosters))

  def probabilities(self, features: np.ndarray) -> np.ndarray:
    """Returns the probability that each candidate is a positive of its query, float32 [P].

    It is the mean of all models, or that of the first model if this is below `LEAST_FOR_ALL`.
    """
    first, *others = self._boosters
    if not len(features):
      return np.zeros(0, np.float32)
    probabilities = np.asarray(first.predict(features), np.float32)
    likely = np.flatnonzero(probabilities >= LEAST_FOR_ALL)
    if len(likely) and others:
      found = [booster.predict(features[likely]) for booster in others]
      probabilities[likely] = np.mean([probabilities[likely], *found], axis=0)
    return probabilities


def dial_scores(probabilities: np.ndarray, inverse_propensity: np.ndarray, tail: float | np.ndarray) -> np.ndarray:
  """Returns what candidates are ranked by: probability * inverse propensity ** tail, float64 [P].

  At 0, it is the probability, whose ranking has the greatest expected P@k. At 1, it is the expected gain in PSP@k, so
  its ranking has the greatest expected PSP@k (Jain et al., KDD 2016).

  Args:
    probabilities: Probabilities [P].
    inverse_propensity: Inverse propensity of each candidate's label [P].
    tail: 0 to 1: how much more rare labels count. One number, or [P].

  Raises:
    InputError: `tail` is out of range.
  """
  check_tail(tail)
  return np.asarray(probabilities, np.float64) * np.asarray(inverse_propensity, np.float64) ** tail


def check_tail(tail: float | np.ndarray) -> None:
  """Checks the dial from frequent to rare labels.

  Raises:
    InputError: It is not between 0 and 1.
  """
  if not np.all((np.asarray(tail) >= 0) & (np.asarray(tail) <= 1)):
    raise InputError(f"tail is {tail}: it must be between 0 and 1")
