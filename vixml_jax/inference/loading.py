"""Loads a trained workdir, with the ranking that is asked for."""

import dataclasses
import os
from pathlib import Path

from jax.sharding import Mesh

from vixml_jax.blend.libraries import check_blend_libraries
from vixml_jax.errors import InputError
from vixml_jax.inference.blend_ranking import BlendRanking, check_dial
from vixml_jax.inference.predictor import AUGMENTED, BLEND, PLAIN, RANKINGS, Predictor
from vixml_jax.inference.quantized_encoder import load_quantized_encoder
from vixml_jax.inference.query_images import QueryImageEncoder
from vixml_jax.inference.trained_encoder import load_trained_encoder
from vixml_jax.run.workdir import INDEX
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.retrieval_augmented import RetrievalSettings

# Value of `encoder` -> the function that loads the encoder.
ENCODERS = {None: load_trained_encoder, "int8": load_quantized_encoder}


def load(
  workdir: str | os.PathLike[str],
  search: str | None = None,
  retrieval_augmented: bool = False,
  mesh: Mesh | None = None,
  *,
  ranking: str | None = None,
  tail: float = 0.0,
  min_probability: float = 0.0,
  retrieval_lambda: float | None = None,
  retrieval_temperature: float | None = None,
  image_checkpoint: str | None = None,
  image_batch_size: int = 8,
  encoder: str | None = None,
) -> Predictor:
  """Loads a trained workdir. No training data are needed.

  Args:
    workdir: Folder of the run.
    search: "exact" (on the devices) or "scann" (approximate, on the CPU); None for the kind that the index was written
      for.
    retrieval_augmented: Short for `ranking="retrieval_augmented"`.
    mesh: Devices to use; None for all devices, in the layout of training if that fits their number.
    ranking: How labels are ranked: "plain" by their cosine with the query, "retrieval_augmented" with the labels of
      similar training queries, or "blend" by a probability that a trained model gives them. The blend has the highest
      precision and takes the most time. None for "plain".
    tail: 0 to 1, for the blend: how much more rare labels count. 0 is best for precision, 1 for propensity-scored
      precision.
    min_probability: For the blend: labels of a lower probability are left out.
    retrieval_lambda: Weight of the labels against that of the training queries; None for that of the run's evaluation.
    retrieval_temperature: Temperature of retrieval; None for that of the run's evaluation.
    image_checkpoint: SigLIP tower that encodes images; None for the one that made the features of the training data.
    image_batch_size: Number of images that the tower encodes at a time. A smaller batch takes as long as a full one.
    encoder: "int8" for an encoder in int8 on the CPU, which needs the extra `onnx`; None for the encoder as trained.

  Raises:
    InputError: A file is missing, damaged, or of another checkpoint.
  """
  ranking = _ranking(ranking, retrieval_augmented)
  check_dial(tail, min_probability)
  for name, value in (("tail", tail), ("min_probability", min_probability)):
    if value and ranking != BLEND:
      raise InputError(f"{name}={value}: only the ranking blend has it, and the ranking is {ranking}")
  if encoder not in ENCODERS:
    raise InputError(f"encoder={encoder}: must be int8, or None for the encoder as trained")
  if ranking == BLEND:
    check_blend_libraries()
  workdir = Path(workdir)
  trained = ENCODERS[encoder](workdir, mesh)
  index = LabelIndex.open(workdir / INDEX, checkpoint=trained.checkpoint, search=search, mesh=trained.mesh)
  image_encoder = None
  if trained.images:
    image_encoder = QueryImageEncoder(trained.config, trained.image_origin or {}, image_checkpoint, image_batch_size)
  plain = Predictor(trained, index, image_encoder, None)
  return with_ranking(
    plain,
    ranking,
    tail=tail,
    min_probability=min_probability,
    retrieval_lambda=retrieval_lambda,
    retrieval_temperature=retrieval_temperature,
  )


def with_ranking(
  predictor: Predictor,
  ranking: str,
  *,
  tail: float = 0.0,
  min_probability: float = 0.0,
  retrieval_lambda: float | None = None,
  retrieval_temperature: float | None = None,
) -> Predictor:
  """Returns a predictor that ranks in another way, with the same encoder and the same opened index.

  Args:
    predictor: A loaded predictor.
    ranking: One of `RANKINGS`; it and the settings are those of `load`. Other rankings ignore a setting.

  Raises:
    InputError: The index lacks what the ranking needs, or a setting is out of range.
  """
  settings = blend = None
  if ranking == AUGMENTED:
    settings = _retrieval_settings(predictor.index, predictor.encoder.workdir, retrieval_lambda, retrieval_temperature)
  if ranking == BLEND:
    blend = BlendRanking.open(predictor.index, tail, min_probability)
  return dataclasses.replace(predictor, retrieval=settings, blend=blend)


def _ranking(ranking: str | None, retrieval_augmented: bool) -> str:
  """Returns the ranking that both arguments of `load` ask for."""
  if ranking is None:
    return AUGMENTED if retrieval_augmented else PLAIN
  if ranking not in RANKINGS:
    raise InputError(f"ranking={ranking!r} is not known: use one of {', '.join(RANKINGS)}")
  if retrieval_augmented and ranking != AUGMENTED:
    raise InputError(f"ranking={ranking} and retrieval_augmented exclude each other; give one of them")
  return ranking


def _retrieval_settings(
  index: LabelIndex, workdir: Path, lambda_: float | None, temperature: float | None
) -> RetrievalSettings:
  """Returns the settings of the evaluation, with the given values in place of its own."""
  stored = index.retrieval
  if stored is None:
    raise InputError(
      f"{workdir / INDEX}: has no training queries, which retrieval-augmented inference needs; run "
      f"python -m vixml_jax.evaluate --workdir={workdir} --retrieval_augmented"
    )
  settings = RetrievalSettings.from_json(stored)
  settings = dataclasses.replace(
    settings,
    lambda_=settings.lambda_ if lambda_ is None else lambda_,
    temperature=settings.temperature if temperature is None else temperature,
  )
  retrieval_augmented.check_setting(settings.lambda_, settings.temperature)
  _ = index.query_index  # Opened now, because the next snapshot removes its files.
  return settings
