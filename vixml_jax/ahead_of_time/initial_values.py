"""The list of what initializes a run: which weights come from where, which are random, and what is frozen."""

from collections.abc import Iterator
import math
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vixml_jax.ahead_of_time.sizes import DataSize
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.run.checkpoint import newest_checkpoint
from vixml_jax.run.from_config import adapter_folder
from vixml_jax.run.workdir import CHECKPOINTS
from vixml_jax.typing import Tree
from vixml_jax.weights import source


def initial_values(config: ConfigDict, model: ModelDefinition, size: DataSize, workdir: Path | None) -> Iterator[str]:
  """Yields a line for each part of a run, in the order in which the parts get their values.

  Args:
    config: The whole config.
    model: Definition of the model.
    size: Size of the data set.
    workdir: Folder of a run that continues from its newest checkpoint; None for a new run.

  Raises:
    InputError: The weights' package is not installed, or the workdir has no whole checkpoint.
  """
  if workdir is not None:
    step, _ = newest_checkpoint(workdir / CHECKPOINTS)
    kept = ", except for the frozen encoder" if model.freezes_encoder else ""
    yield f"{workdir / CHECKPOINTS / str(step)}: the checkpoint of step {step} replaces all values below{kept}"
  rest, base = model.split_base(model.shapes)
  random = f"random, seed {config.seed} (config.seed)"
  fate = "frozen" if model.freezes_encoder else "trained"
  yield f"encoder: {_count(base)}, {fate}, {_weights(config, random)}"
  if "encoder" in rest:
    folder = adapter_folder(config)
    made = "lora_a random, lora_b zero, " + random.removeprefix("random, ") if folder is None else f"from {folder}"
    yield f"adapters of the encoder: {_count(rest['encoder'])}, trained, {made}"
  if "fusion" in rest:
    yield f"fusion: {_count(rest['fusion'])}, trained, {random}" + _residual(config)
  if "prototype" in rest:
    yield f"prototype: {_count(rest['prototype'])}, trained, {random}; initial values of {config.train.new_init}"
  if model.has_free_vectors:
    yield f"free_vectors: {_count(rest['free_vectors'])}, trained, {_free_vectors(config, random)}"
    yield f"the free vector of each of {size.labels:,} labels: {_clusters(config, size)}"
  if model.has_centroids:
    when = "before the first step" if config.train.epochs else "at the end, since nothing is trained"
    yield f"label centroids: means of the embeddings of their training queries, made {when}"
  yield f"embedding bank of {size.train:,} training queries: zeros in {config.train.bank_dtype}"
  yield "optimizer: AdamW, zeros"
  yield f"order of the queries, positives and dropout: random, seed {config.seed}"


def _count(tree: Tree) -> str:
  return f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)):,} parameters"


def _weights(config: ConfigDict, random: str) -> str:
  """Returns where the weights of the encoder come from."""
  name = config.encoder.pretrained
  if config.encoder.random_init:
    return f"{random}; only the tokenizer is that of {name}"
  folder = source.find_local(name)
  place = "which will be fetched from the hub" if folder is None else "on this machine"
  return f"pretrained: {name}, {place}" + (", sha256 pinned" if name in source.PINNED else "")


def _residual(config: ConfigDict) -> str:
  if config.fusion.method != "early" or not config.fusion.residual:
    return ""
  return (
    f"; its residual map: whitened features of the images, turned at random, with {config.fusion.residual} of the "
    "length of pooled texts"
  )


def _free_vectors(config: ConfigDict, random: str) -> str:
  if config.train.free_vector_init == "cluster_mean":
    return "the mean initial embedding of the labels that share one"
  return f"{random}, Xavier"


def _clusters(config: ConfigDict, size: DataSize) -> str:
  if config.train.free_vectors >= size.labels:
    return "its own"
  return f"that of its cluster, one of {config.train.free_vectors:,} by balanced k-means of initial embeddings"
