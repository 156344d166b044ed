"""The model of the blend: gradient-boosted trees that turn the features of a candidate into a probability."""

import numpy as np

from vixml_jax.blend.features import CLASSIFIER_FEATURES, FEATURES
from vixml_jax.blend.libraries import import_library
from vixml_jax.errors import InputError

NUM_ROUNDS = 150
_PARAMETERS = {
  "objective": "binary",
  # Chosen on held-out queries (docs/results.md).
  "learning_rate": 0.07,
  "num_leaves": 31,
  "min_data_in_leaf": 20,
  "feature_fraction": 0.5,
  "seed": 0,
  # The same trees for the same data and number of threads: LightGBM, "deterministic".
  "deterministic": True,
  "force_row_wise": True,
  "verbosity": -1,
}


class BlendModel:
  """A trained model, in the text format of LightGBM (Ke et al., NeurIPS 2017).

  Attributes:
    text: The model; `BlendModel(text)` gives the same probabilities, bit for bit.
    uses_classifiers: Whether its features include those of classifiers.
  """

  def __init__(self, text: str):
    """Reads a model.

    Raises:
      InputError: The text is damaged or has other features, or LightGBM is not installed.
    """
    lightgbm = import_library("lightgbm")
    try:
      self._booster = lightgbm.Booster(model_str=text)
    except lightgbm.basic.LightGBMError as error:
      raise InputError(f"the model of the blend cannot be read ({error}); run python -m vixml_jax.evaluate") from error
    names = tuple(self._booster.feature_name())
    if names not in (FEATURES, FEATURES + CLASSIFIER_FEATURES):
      raise InputError("the model of the blend has other features than this version; run python -m vixml_jax.evaluate")
    self.text = text
    self.uses_classifiers = names != FEATURES

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
    booster = lightgbm.train(_PARAMETERS | {"num_threads": num_threads}, data, num_boost_round=NUM_ROUNDS)
    return cls(booster.model_to_string())

  def probabilities(self, features: np.ndarray) -> np.ndarray:
    """Returns the probability that each candidate is a positive of its query, float32 [P]."""
    if not len(features):
      return np.zeros(0, np.float32)
    return np.asarray(self._booster.predict(features), np.float32)


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
