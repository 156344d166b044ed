"""A trained encoder without its data: the newest checkpoint of a workdir, restored onto any mesh."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import ItemEncoder, encoding_layout, normalize
from vixml_jax.errors import InputError
from vixml_jax.images.features import ImageFeatures
from vixml_jax.inference.small_shapes import SmallShapes
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedItems, PackedLayout, pack
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models.attention_call import AUTO
from vixml_jax.models.definition import ModelDefinition
from vixml_jax.models.parameters import unstack_layers
from vixml_jax.models.transformer import is_unrolled
from vixml_jax.ragged import Ragged
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import checkpoint_id, newest_checkpoint, restore_params
from vixml_jax.run.from_config import layout_from_config, model_from_config
from vixml_jax.run.inference_files import read_inference_info
from vixml_jax.run.pretrained import check_base, frozen_params
from vixml_jax.run.state import abstract_params
from vixml_jax.run.workdir import CHECKPOINTS, CONFIG, TOKENIZER
from vixml_jax.typing import Tree
from vixml_jax.weights import source

_MOST_SMALL_CHUNKS = 8  # Items that need more chunks than this are encoded in chunks of full size.


@dataclasses.dataclass(frozen=True)
class TrainedEncoder:
  """Embeds texts and images as training did; `load_trained_encoder` makes it.

  Attributes:
    workdir: Folder that training wrote.
    checkpoint: Step and sha256 of the model, as an index records them.
    config: Config of the run.
    meta: JSON part of the checkpoint: provenance.
    image_origin: How the image features of the training data were made; None for a model of texts only.
    definition: Definition of the model.
    tokenizer: Tokenizer of the texts.
    layout: Shape of packed rows.
    mesh: Devices that hold parameters and rows.
    params: Trained parameters.
    frozen: Parameters that were not trained.
  """

  workdir: Path
  checkpoint: dict[str, Any]
  config: ConfigDict = dataclasses.field(repr=False)
  meta: dict[str, Any] = dataclasses.field(repr=False)
  image_origin: dict[str, Any] | None = dataclasses.field(repr=False)
  definition: ModelDefinition = dataclasses.field(repr=False)
  tokenizer: Tokenizer = dataclasses.field(repr=False)
  layout: PackedLayout = dataclasses.field(repr=False)
  mesh: Mesh = dataclasses.field(repr=False)
  params: Tree = dataclasses.field(repr=False)
  frozen: Tree = dataclasses.field(repr=False)

  @property
  def images(self) -> int:
    """I, the largest number of images of an item; 0 for a model of texts only."""
    return self.config.images

  @property
  def feature_dim(self) -> int:
    """F, the size of an image's feature vector."""
    return self.config.features.dim

  def settings(self) -> dict[str, Any]:
    """Returns what determines an embedding besides its item, as JSON."""
    return {"checkpoint": self.checkpoint}

  def embed(
    self,
    texts: Sequence[str] | Ragged,
    vectors: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    whole_chunks: bool = False,
  ) -> np.ndarray:
    """Returns plain embeddings of unit norm, float32 [items, D].

    Args:
      texts: Texts of the items, or what `tokenizer` returned for them.
      vectors: Feature vectors [F] of each item's images; the first I of each item are used.
      whole_chunks: Whether to always run the program for chunks of `layout.chunk_rows` rows, so that the last few
        items of a file compile nothing. Otherwise few items are put into chunks with as few empty rows as possible.
    """
    return normalize(self.pooled(texts, vectors, whole_chunks=whole_chunks))

  def pooled(
    self,
    texts: Sequence[str] | Ragged,
    vectors: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    whole_chunks: bool = False,
  ) -> np.ndarray:
    """Returns encoder outputs before normalization, float32 [items, D]; arguments as for `embed`."""
    items, features = self._items(texts, vectors)
    lengths, layout = self.layout.item_lengths(items), self.layout
    if whole_chunks or lengths.sum() > _MOST_SMALL_CHUNKS * layout.chunk_rows * layout.row_length:
      return self._whole_chunks.pooled(self.params, items, features=features)
    shape = self._small_shapes.choose(lengths)
    packed = pack(items, shape.layout, round_up=False)
    return self._pooled_packed(packed, shape.with_chunks(len(packed.tokens)), features)

  def warm_up(self, items: int) -> Iterator[Callable[[], object]]:
    """Yields functions to call one after the other; after that, up to `items` items compile no program."""
    one, features = self._items([""], None)
    for layout in self._small_shapes.all(items):
      packed = pack(one, dataclasses.replace(layout, chunk_rows=1), round_up=False)
      yield functools.partial(self._pooled_packed, packed, layout, features)

  def prototypes(self, pooled: np.ndarray, clusters: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns prototypes of labels, float32 [L, D] of unit norm; see `ItemEncoder.prototypes`."""
    return self._whole_chunks.prototypes(self.params, pooled, clusters, centroids)

  def _pooled_packed(self, packed: PackedItems, layout: PackedLayout, features: ImageFeatures | None) -> np.ndarray:
    """Returns encoder outputs of items that were packed into chunks of one row."""
    if layout not in self._encoders:
      self._encoders[layout] = ItemEncoder(self.definition, layout, self.mesh, frozen=self.frozen)
    encoder = self._encoders[layout]
    return encoder.pooled_packed(self._params_by_layer, packed.with_chunk_rows(layout.chunk_rows), features)

  def _items(
    self, texts: Sequence[str] | Ragged, vectors: Sequence[Sequence[np.ndarray]] | None
  ) -> tuple[Items, ImageFeatures | None]:
    tokens = texts if isinstance(texts, Ragged) else self.tokenizer(texts)
    if not self.images:
      return Items.of_texts(tokens), None
    kept = [given[: self.images] for given in vectors] if vectors is not None else [()] * len(tokens)
    lengths = [len(given) for given in kept]
    rows = Ragged.of_lengths(np.arange(sum(lengths), dtype=np.int32), lengths)
    # Empty places of packed rows refer to row 0, so there must be one.
    values = [vector for given in kept for vector in given] or [np.zeros(self.feature_dim)]
    return Items(tokens, rows), ImageFeatures(np.stack(values).astype(np.float16))

  @functools.cached_property
  def _whole_chunks(self) -> ItemEncoder:
    """Encoder of many items."""
    return ItemEncoder(self.definition, self.layout, self.mesh, frozen=self.frozen)

  @functools.cached_property
  def _encoders(self) -> dict[PackedLayout, ItemEncoder]:
    """Encoders of few items; each keeps its compiled program."""
    return {}

  @functools.cached_property
  def _small_shapes(self) -> SmallShapes:
    """Shapes of the programs of few items."""
    return SmallShapes(self.layout, self.mesh)

  @functools.cached_property
  def _params_by_layer(self) -> Tree:
    """Parameters for programs of few items. On a CPU these read the array of each layer instead of copying it."""
    is_cpu, encoder = self.mesh.size == 1 and sharding.platform_of(self.mesh) == "cpu", self.config.encoder
    if not is_cpu or encoder.architecture != "bert" or not is_unrolled(encoder.num_layers, encoder.remat):
      return self.params
    return unstack_layers(self.params, self.definition.axes)


def load_trained_encoder(workdir: Path, mesh: Mesh | None = None) -> TrainedEncoder:
  """Restores the newest checkpoint of a workdir. No training data are needed.

  Args:
    workdir: Folder that training, or `vixml_jax.evaluate`, wrote.
    mesh: Devices to restore onto; None for all devices of this process, in the layout of training if that fits their
      number.

  Raises:
    InputError: A file is missing or damaged, or the frozen encoder is not the one of training.
  """
  config = configuration.read(workdir / CONFIG)
  config.encoder.attention = AUTO  # The platform may differ from that of training.
  step, meta = newest_checkpoint(workdir / CHECKPOINTS)
  info = read_inference_info(workdir, step)
  source.check_hashes(workdir / TOKENIZER, info["tokenizer_sha256"])
  tokenizer = Tokenizer(workdir / TOKENIZER, config.dataset.max_length, config.encoder.vocab_size)
  mesh = mesh or _mesh(config)
  definition = model_from_config(config)
  pretrained = None
  if definition.freezes_encoder and not config.encoder.random_init:
    pretrained = source.resolve(config.encoder.pretrained, tokenizer=False)
  check_base(definition, pretrained, workdir, meta)
  abstract, _ = definition.split(abstract_params(definition, mesh))
  return TrainedEncoder(
    workdir=workdir,
    checkpoint=checkpoint_id(workdir / CHECKPOINTS, step),
    config=config,
    meta=meta,
    image_origin=info["image_features"],
    definition=definition,
    tokenizer=tokenizer,
    layout=_layout(config, tokenizer, mesh),
    mesh=mesh,
    params=restore_params(workdir / CHECKPOINTS, step, abstract),
    frozen=frozen_params(definition, mesh, config.seed, pretrained),
  )


def _mesh(config: ConfigDict) -> Mesh:
  """Returns this process's devices in the layout of training, or else along the axis free for that architecture."""
  devices = jax.local_devices()
  try:
    return sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
  except InputError:
    sizes = dict(data=1, fsdp=len(devices)) if config.encoder.architecture == "decoder" else {}
    return sharding.make_mesh(**sizes, devices=devices)


def _layout(config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh) -> PackedLayout:
  """Returns the layout of training, with chunks that the mesh divides and that suit its platform."""
  layout, unit = layout_from_config(config, tokenizer), sharding.row_devices(mesh)
  return encoding_layout(dataclasses.replace(layout, chunk_rows=-(-layout.chunk_rows // unit) * unit), mesh)
