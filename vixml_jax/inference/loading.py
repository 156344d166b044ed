"""Loads a trained workdir, with the ranking that is asked for."""

import dataclasses
import os
from pathlib import Path

from jax.sharding import Mesh

from vixml_jax.blend.libraries import check_blend_libraries
from vixml_jax.errors import InputError
from vixml_jax.inference.blend_ranking import BlendRanking, check_dial
from vixml_jax.inference.predictor import Predictor
from vixml_jax.inference.quantized_encoder import load_quantized_encoder
from vixml_jax.inference.query_images import QueryImageEncoder
from vixml_jax.inference.rankings import AUGMENTED, BLEND, PLAIN, RANKINGS
from vixml_jax.inference.trained_encoder import TrainedEncoder, load_trained_encoder
from vixml_jax.run.workdir import INDEX
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.retrieval_augmented import RetrievalSettings
from vixml_jax.search.vector_form import VectorForm

# Value of `encoder` -> the function that loads the encoder.
ENCODERS = {None: load_trained_encoder, "int8": load_quantized_encoder}


def load_predictor(
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
  index_dtype: str = "float32",
  dims: int | None = None,
) -> Predictor:
  """Loads encoder and label index of a workdir; the arguments are those of `vixml_jax.load`.

  Raises:
    InputError: A file is missing, damaged, or of another checkpoint.
  """
  ranking = _ranking(ranking, retrieval_augmented)
  check_dial(tail, min_probability)
  for name, value in (("tail", tail), ("min_probability", min_probability)):
    if value and ranking != BLEND:
      raise InputError(f"{name}={value}: only the ranking blend has it, and the ranking is {ranking}")
  if ranking == BLEND:
    _check_blend(dims)
  workdir = Path(workdir)
  trained, image_encoder = load_encoder(workdir, mesh, image_checkpoint, image_batch_size, encoder)
  form = VectorForm(index_dtype, dims)
  index = LabelIndex.open(workdir / INDEX, checkpoint=trained.checkpoint, search=search, mesh=trained.mesh, form=form)
  return with_ranking(
    Predictor(trained, index, image_encoder, None),
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
    tail: As for `load`, like the others.
    min_probability: For the blend.
    retrieval_lambda: For retrieval augmentation.
    retrieval_temperature: For retrieval augmentation.

  Raises:
    InputError: The ranking is unknown, the index or this environment lacks what it needs, or a setting is out of range.
  """
  settings = blend = None
  if _ranking(ranking, retrieval_augmented=False) == AUGMENTED:
    settings = _retrieval_settings(predictor.index, predictor.encoder.workdir, retrieval_lambda, retrieval_temperature)
  if ranking == BLEND:
    _check_blend(predictor.index.form.dims)
    blend = BlendRanking.open(predictor.index, tail, min_probability)
  return dataclasses.replace(predictor, retrieval=settings, blend=blend)


def load_encoder(
  workdir: Path, mesh: Mesh | None, image_checkpoint: str | None, image_batch_size: int, encoder: str | None
) -> tuple[TrainedEncoder, QueryImageEncoder | None]:
  """Loads the encoders of texts and of images; None for the latter if the model reads texts only.

  Args:
    workdir: As for `load`, like the others.
    mesh: Devices to use.
    image_checkpoint: Tower that encodes images.
    image_batch_size: Number of images that it encodes at a time.
    encoder: "int8", or None for the encoder as trained.

  Raises:
    InputError: As for `load`.
  """
  if encoder not in ENCODERS:
    raise InputError(f"encoder={encoder}: must be int8, or None for the encoder as trained")
  trained = ENCODERS[encoder](workdir, mesh)
  if not trained.images:
    return trained, None
  origin = trained.image_origin or {}
  return trained, QueryImageEncoder(trained.config, origin, image_checkpoint, image_batch_size)


def _check_blend(dims: int | None) -> None:
  """Checks that the blend can rank: its libraries are installed, and vectors have all dimensions."""
  if dims is not None:
    raise InputError(f"dims={dims}: the ranking blend needs all dimensions, on which it was fitted; leave out dims")
  check_blend_libraries()


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
