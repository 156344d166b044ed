"""Checks that the values of several keys fit together, as far as neither the data nor the devices decide."""

from typing import Any

from vixml_jax.errors import InputError, shown
from vixml_jax.input.prompt import template_words
from vixml_jax.run.configuration.encoder_combinations import check_encoder


def check_combinations(values: dict[str, Any]) -> None:
  """Checks pairs of keys, the encoder, the prompt, images, the evaluation and the mesh.

  Args:
    values: The values of a config by their dotted keys. Each is in its range.

  Raises:
    InputError: Values do not fit together; the message names the keys.
  """
  _check_order(values)
  check_encoder(values)
  phrases = [key.removeprefix("prompt.phrases.") for key in values if key.startswith("prompt.phrases.")]
  template_words(values["prompt.template"], phrases, values["images"] > 0 and values["fusion.method"] == "early")
  _check_images(values)
  _check_evaluation(values)
  open_axes = [key for key in ("mesh.data", "mesh.fsdp", "mesh.tensor") if values[key] == -1]
  if len(open_axes) > 1 and values["mesh.fsdp"]:
    raise InputError(
      f"config.{open_axes[0]}=-1: must be a number, since config.{open_axes[1]}=-1; only one can be left"
    )


def _check_order(values: dict[str, Any]) -> None:
  """Checks that a value that bounds another is the greater one; 0 stands for a value that is chosen later."""
  limits = [("loss.margin_min", "loss.margin_max"), ("dataset.max_length", "train.row_length")]
  if values["encoder.architecture"] == "bert":
    limits.append(("dataset.max_length", "encoder.max_position"))
  for small, large in limits:
    if values[small] > values[large] and (large, values[large]) != ("train.row_length", 0):
      raise InputError(f"config.{small}={values[small]}: must be at most config.{large}={values[large]}")


def _check_images(values: dict[str, Any]) -> None:
  """Checks keys that only some models with images have."""
  if values["fusion.residual"] and values["fusion.method"] != "early":
    raise InputError(
      f"config.fusion.residual={values['fusion.residual']}: must be 0 unless config.fusion.method is early"
    )
  if values["fusion.adapter"] == "cross_attention" and values["fusion.method"] != "early":
    raise InputError(
      "config.fusion.adapter=cross_attention: needs config.fusion.method=early, where images are tokens beside words"
    )
  if len(values["eval.test_images"]) and not values["images"]:
    raise InputError(f"config.eval.test_images={values['eval.test_images']}: must be empty, since config.images=0")


def _check_evaluation(values: dict[str, Any]) -> None:
  """Checks keys of searches, and that queries are held out where the evaluation needs them."""
  if values["eval.retrieval_query_hits"] and values["eval.retrieval_search"] == "joint":
    raise InputError(
      f"config.eval.retrieval_query_hits={values['eval.retrieval_query_hits']}: must be 0 unless "
      "config.eval.retrieval_search is separate; config.eval.retrieval_hits is the number of both together"
    )
  if values["eval.classifier_share"] > 0 and not values["eval.blend"]:
    raise InputError(
      f"config.eval.classifier_share={values['eval.classifier_share']:g}: needs config.eval.blend=True, with which "
      "classifiers of labels are trained"
    )
  held_out = values["dataset.validation_fraction"] != 0
  for key, wants in (
    ("eval.retrieval_choose", values["eval.retrieval_choose"]),
    ("eval.blend", values["eval.blend"]),
    ("eval.baselines", bool(values["eval.baselines"])),
    ("eval.split", values["eval.split"] == "validation"),
  ):
    if wants and not held_out:
      raise InputError(
        f"config.{key}={shown(values[key])}: needs held-out queries; set config.dataset.validation_fraction above 0"
      )
