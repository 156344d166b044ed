"""The data set of a run: tokens, image features, and which training queries are trained on or held out."""

import dataclasses

from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import tensorflow_datasets as tfds

from vixml_jax.datasets.bucket_sets import prepare_shared, shared_sets
from vixml_jax.datasets.propensity import inverse_propensity
from vixml_jax.errors import InputError
from vixml_jax.images.extraction import prepare_features
from vixml_jax.images.feature_set import open_features
from vixml_jax.images.features import ImageFeatures, load_image_features
from vixml_jax.input.corpus import Corpus, load_corpus
from vixml_jax.input.hold_out import hold_out
from vixml_jax.input.items import Items
from vixml_jax.input.tokenizer import Tokenizer
from vixml_jax.ragged import Ragged
from vixml_jax.remote import local_data_dir


@dataclasses.dataclass(frozen=True)
class RunData:
  """A data set as a run reads it.

  Attributes:
    corpus: tokens, labels and filters of all splits.
    items: texts and images of "train", "test" and "labels".
    image_features: features of all images; None for a model of texts only.
    train_rows: int64 [n], the training queries that are trained on: those with labels that are not held out.
    validation_rows: int64, the held-out training queries with labels.
    fingerprint: identifies the data that a checkpoint was trained on.
  """

  corpus: Corpus
  items: dict[str, Items]
  image_features: ImageFeatures | None
  train_rows: np.ndarray
  validation_rows: np.ndarray
  fingerprint: str

  @property
  def num_labels(self) -> int:
    """L."""
    return self.corpus.num_labels

  @property
  def train_items(self) -> Items:
    """Texts and images of the queries in `train_rows`."""
    return self.items["train"] if self._trains_on_all else self.items["train"].take(self.train_rows)

  @property
  def train_labels(self) -> Ragged:
    """Label ids of the queries in `train_rows`."""
    return self.corpus.train_labels if self._trains_on_all else self.corpus.train_labels.take(self.train_rows)

  @property
  def known(self) -> np.ndarray:
    """bool [N], the training queries that are trained on."""
    known = np.zeros(len(self.corpus.train_labels), bool)
    known[self.train_rows] = True
    return known

  @property
  def _trains_on_all(self) -> bool:
    return len(self.train_rows) == len(self.corpus.train_tokens)

  def inverse_propensity(self, a: float, b: float) -> np.ndarray:
    """Returns inverse propensities over all training queries, as published results use them, float64 [L]."""
    frequencies = np.bincount(self.corpus.train_labels.values, minlength=self.num_labels)
    return inverse_propensity(frequencies, len(self.corpus.train_labels), a, b)

  def evaluated_queries(self, split: str) -> tuple[str, np.ndarray]:
    """Returns the data set's split that evaluation reads for `eval.split`, and the rows of the queries in it."""
    if split == "validation":
      return "train", self.validation_rows
    return "test", np.arange(len(self.items["test"]))


def prepare_data(config: ConfigDict) -> tfds.core.DatasetBuilder:
  """Prepares the data set of a config where it is missing.

  Raises:
    InputError: the raw files are missing or wrong.
  """
  wanted = config.dataset
  return prepare_shared(wanted.name, wanted.raw_dir, wanted.data_dir, wanted.allow_empty_filter)


def load_data(
  config: ConfigDict, builder: tfds.core.DatasetBuilder, tokenizer: Tokenizer, mesh: Mesh, *, extract: bool
) -> RunData:
  """Opens a prepared data set.

  Image features are opened before texts are tokenized, which takes minutes: missing features are found first.

  Args:
    config: the whole config.
    builder: the data set.
    tokenizer: tokenizer of the texts.
    mesh: the devices that image features are placed on.
    extract: make image features where `features.checkpoint` names a tower; otherwise they must exist.

  Raises:
    InputError: the prepared set or the image features are missing or do not fit the config.
  """
  wanted = config.dataset
  features, image_rows, fingerprint = _load_features(config, builder, mesh, extract)
  corpus = load_corpus(builder, tokenizer, tuple(wanted.text_fields), local_data_dir(wanted.data_dir) / "tokens")
  held_out = hold_out(corpus.train_tokens, wanted.validation_fraction, config.seed)
  labeled = corpus.train_labels.lengths > 0
  train_rows = np.flatnonzero(labeled & ~held_out)
  if not len(train_rows):
    raise InputError(f"{wanted.name}: no training query has a label; check target_ind in trn.json.gz")
  if config.eval.split == "test" and not len(corpus.test_labels.values):
    raise InputError(
      f"{wanted.name}: no test query has a label, so that nothing can be measured; check target_ind in tst.json.gz, or "
      "set --config.eval.split=validation"
    )
  tokens = {"train": corpus.train_tokens, "test": corpus.test_tokens, "labels": corpus.label_tokens}
  items = {
    split: Items(texts, image_rows[split]) if image_rows else Items.of_texts(texts) for split, texts in tokens.items()
  }
  return RunData(
    corpus=corpus,
    items=items,
    image_features=features,
    train_rows=train_rows,
    validation_rows=np.flatnonzero(labeled & held_out),
    fingerprint=corpus.fingerprint + fingerprint,
  )


def _load_features(
  config: ConfigDict, builder: tfds.core.DatasetBuilder, mesh: Mesh, extract: bool
) -> tuple[ImageFeatures | None, dict[str, Ragged], str]:
  """Returns image features in their place, the rows of each item, and what they add to the data's fingerprint."""
  if not config.images:
    return None, {}, ""
  wanted = config.features
  with shared_sets(config.dataset.data_dir, f"{builder.name}_features/{wanted.name}") as data_dir:
    if extract and wanted.checkpoint:
      extracted = prepare_features(
        builder,
        data_dir,
        wanted.checkpoint,
        name=wanted.name,
        variant=wanted.variant or None,
        preprocessing=wanted.preprocessing,
      )
      assert extracted is not None  # The processes of a run are joined.
      found = extracted
    else:
      found = open_features(builder, data_dir, wanted.name)
  if found.dim != wanted.dim:
    raise InputError(
      f"config.features.dim={wanted.dim}: the features {wanted.name} of {config.dataset.name} have {found.dim}; set it "
      "to that"
    )
  loaded = load_image_features(found, config.images, data_dir / "feature_banks")
  return loaded.features.placed(mesh, config.fusion.bank), loaded.rows, f"+{loaded.fingerprint}"
