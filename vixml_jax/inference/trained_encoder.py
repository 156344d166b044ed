"""A trained encoder without its data: the newest checkpoint of a workdir, restored onto any mesh."""

from collections.abc import Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.errors import InputError
from vixml_jax.images.features import ImageFeatures
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.ragged import Ragged
from vixml_jax.rounding import next_power_of_two
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import checkpoint_id, newest_checkpoint, restore_params
from vixml_jax.run.from_config import layout_of, model_of
from vixml_jax.run.pretrained import frozen_params
from vixml_jax.run.state import abstract_params
from vixml_jax.run.workdir import CHECKPOINTS, INFERENCE_INFO, TOKENIZER
from vixml_jax.training.start import check_base
from vixml_jax.typing import Tree
from vixml_jax.weights import source


@dataclasses.dataclass(frozen=True)
class TrainedEncoder:
  """What embeds texts and images as training did.

  Attributes:
    workdir: where it comes from.
    config: of the run.
    checkpoint: step and sha256 of the model, as an index records them.
    meta: JSON part of the checkpoint: provenance.
    image_origin: how the image features of the training data were made; None for a model of texts only.
    definition: the model without values.
    tokenizer: of the texts.
    layout: shape of packed rows.
    mesh: devices that parameters and rows lie on.
    params: the parameters that are trained.
    frozen: the others.
  """

  workdir: Path
  config: ConfigDict
  checkpoint: dict[str, Any]
  meta: dict[str, Any]
  image_origin: dict[str, Any] | None
  definition: ModelDefinition
  tokenizer: Tokenizer
  layout: PackedLayout
  mesh: Mesh
  params: Tree = dataclasses.field(repr=False)
  frozen: Tree = dataclasses.field(repr=False)

  @property
  def images(self) -> int:
    """I, the most images of an item; 0 for a model of texts only."""
    return self.config.images

  @property
  def feature_dim(self) -> int:
    """F."""
    return self.config.features.dim

  def embed(
    self, texts: Sequence[str], vectors: Sequence[Sequence[np.ndarray]] | None = None, *, whole_chunks: bool = False
  ) -> np.ndarray:
    """Unit-norm plain embeddings, float32 [items, D].

    Args:
      texts: of the items.
      vectors: for each item the feature vectors [F] of its images; of more than I the first are taken.
      whole_chunks: always run the program for chunks of `layout.chunk_rows` rows, so that nothing is compiled for a
        last few items; else few items go in a chunk that is no larger than it has to be.
    """
    items, bank = self._items(texts, vectors)
    return self._encoder(self._rows(items, whole_chunks)).queries(self.params, items, bank=bank)

  def pooled(self, texts: Sequence[str], vectors: Sequence[Sequence[np.ndarray]] | None = None) -> np.ndarray:
    """Encoder outputs before the norm, float32 [items, D]; arguments as for `embed`."""
    items, bank = self._items(texts, vectors)
    return self._encoder(self._rows(items, False)).pooled(self.params, items, bank=bank)

  def prototypes(self, pooled: np.ndarray, clusters: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Unit-norm prototypes of labels, float32 [L, D], of their `pooled` outputs; see `ItemEncoder.prototypes`."""
    return self._encoder(self.layout.chunk_rows).prototypes_of(self.params, pooled, clusters, centroids)

  def _items(
    self, texts: Sequence[str], vectors: Sequence[Sequence[np.ndarray]] | None
  ) -> tuple[Items, ImageFeatures | None]:
    tokens = self.tokenizer(texts)
    if not self.images:
      return Items.of_texts(tokens), None
    kept = [given[: self.images] for given in vectors] if vectors is not None else [()] * len(texts)
    lengths = [len(given) for given in kept]
    rows = Ragged.of_lengths(np.arange(sum(lengths), dtype=np.int32), lengths)
    # Empty places of packed rows name row 0, which has to exist.
    values = [vector for given in kept for vector in given] or [np.zeros(self.feature_dim)]
    return Items(tokens, rows), ImageFeatures(np.stack(values).astype(np.float16), {}, "")

  def _rows(self, items: Items, whole_chunks: bool) -> int:
    """Rows of a chunk: of few sizes, since each compiles a program."""
    most, unit = self.layout.chunk_rows, sharding.row_devices(self.mesh)
    if whole_chunks or items.tokens.lengths.sum() > most * self.layout.row_length:
      return most
    needed = len(pack(items, dataclasses.replace(self.layout, chunk_rows=unit), round_up=False).tokens)
    return min(unit * next_power_of_two(needed), most)

  def _encoder(self, rows: int) -> ItemEncoder:
    if rows not in self._encoders:
      layout = dataclasses.replace(self.layout, chunk_rows=rows)
      self._encoders[rows] = ItemEncoder(self.definition, layout, self.mesh, frozen=self.frozen)
    return self._encoders[rows]

  @functools.cached_property
  def _encoders(self) -> dict[int, ItemEncoder]:
    """By rows of a chunk; each keeps its compiled programs."""
    return {}


def load_trained_encoder(workdir: Path, mesh: Mesh | None = None) -> TrainedEncoder:
  """Restores the newest checkpoint of a workdir; no training data are needed.

  Args:
    workdir: what training, or `vixml_jax.evaluate`, wrote.
    mesh: devices to restore onto; by default all devices, laid out as in training where that fits their number.

  Raises:
    InputError: for whatever is missing or damaged, and where the frozen base of a decoder is not the one it was
      trained on.
  """
  config = configuration.read(workdir / "config.json")
  configuration.check(config)
  step, meta = newest_checkpoint(workdir / CHECKPOINTS)
  facts = _facts(workdir, step)
  folder = workdir / TOKENIZER
  source.check_hashes(folder, facts["tokenizer_sha256"])
  tokenizer = Tokenizer(folder, config.dataset.max_length)
  mesh = mesh or _mesh(config)
  definition = model_of(config)
  pretrained = None
  if definition.freezes_encoder and not config.encoder.random_init:
    pretrained = source.resolve(config.encoder.pretrained)
  check_base(definition, pretrained, workdir, meta)
  abstract, _ = definition.split(abstract_params(definition, mesh))
  return TrainedEncoder(
    workdir=workdir,
    config=config,
    checkpoint=checkpoint_id(workdir / CHECKPOINTS, step),
    meta=meta,
    image_origin=facts["image_features"],
    definition=definition,
    tokenizer=tokenizer,
    layout=_layout(config, tokenizer, mesh),
    mesh=mesh,
    params=restore_params(workdir / CHECKPOINTS, step, abstract),
    frozen=frozen_params(definition, mesh, config.seed, pretrained),
  )


def _facts(workdir: Path, step: int) -> dict[str, Any]:
  path = workdir / INFERENCE_INFO
  try:
    facts = json.loads(path.read_text(encoding="utf-8"))
    return {key: facts[key] for key in ("tokenizer_sha256", "image_features")}
  except FileNotFoundError as error:
    raise InputError(
      f"{workdir}: has a checkpoint of step {step}, but no {INFERENCE_INFO}, tokenizer or index to answer queries "
      f"with; where its data set is, run python -m vixml_jax.evaluate --workdir={workdir}"
    ) from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path}: damaged ({type(error).__name__}: {error}); run python -m vixml_jax.evaluate "
      f"--workdir={workdir} to write it again"
    ) from error


def _mesh(config: ConfigDict) -> Mesh:
  """All devices in the layout of training, else all of them along the axis that training left open."""
  try:
    return sharding.make_mesh(**config.mesh.to_dict())
  except InputError:
    decoder = config.encoder.architecture == "decoder"
    return sharding.make_mesh(data=1, fsdp=len(jax.devices())) if decoder else sharding.make_mesh()


def _layout(config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh) -> PackedLayout:
  """As in training, in chunks that the mesh divides."""
  layout, unit = layout_of(config, tokenizer), sharding.row_devices(mesh)
  return dataclasses.replace(layout, chunk_rows=-(-layout.chunk_rows // unit) * unit)
