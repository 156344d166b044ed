"""Makes image features of a data set: encodes the images part by part, and merges the parts to a feature set."""

from collections.abc import Iterator
import json
import logging
import os
from pathlib import Path
import shutil
import time
from typing import Any

import jax
import tensorflow_datasets as tfds

from vixml_jax import sharding
from vixml_jax.datasets.raw import SPLITS
from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of, locked, new_file
from vixml_jax.images import feature_set, sources
from vixml_jax.images.feature_parts import FeatureParts, MergedParts
from vixml_jax.images.feature_set import FeatureSet
from vixml_jax.images.preprocess import AUTO
from vixml_jax.images.processor import choose_preprocessing
from vixml_jax.images.sources import ImageSource
from vixml_jax.images.tower import ImageTower
from vixml_jax.process_share import ProcessShare, joined_share
from vixml_jax.weights import vision

BAD_IMAGES = "bad_images.jsonl"
"""File next to the features with a line for each image without features: split, row, slot and reason."""

_log = logging.getLogger(__name__)


def prepare_features(
  builder: tfds.core.DatasetBuilder,
  data_dir: str | os.PathLike[str],
  checkpoint: str,
  *,
  name: str = "",
  variant: str | None = None,
  preprocessing: str = AUTO,
  images: str = "",
  batch_size: int = 64,
  dtype: str = "",
  share: ProcessShare | None = None,
) -> FeatureSet | None:
  """Makes features of the images of a data set if that has not been done, and opens them.

  A run that is killed and started again keeps its finished parts, of about 2,000 images each. If there are several
  processes, each makes its share of the parts on its own devices, and the one that finds all parts finished writes the
  feature set; they must share the folder `data_dir`. They may be started again in another number.

  Args:
    builder: Prepared data set.
    data_dir: Folder for all prepared data.
    checkpoint: An `.npz` of big_vision, a Hugging Face folder, or a name on the hub; see `weights.vision.load_tower`.
    name: Name of the features; "" for the variant, or else for the name of the checkpoint's file or folder.
    variant: Key of `weights.siglip.VARIANTS` that the checkpoint must be; None for any tower.
    preprocessing: One of `images.preprocess.KINDS`.
    images: Place of the images, see `images.sources.open_sources`; "" for the images in the data set.
    batch_size: Number of images per step of each process, rounded up to a multiple of its devices.
    dtype: Type in which the tower computes; "" for float32 on CPUs and bfloat16 elsewhere.
    share: Share of this process; None for the one that `jax.distributed` gives it.

  Returns:
    The features; None if they are not joined and other processes have parts to make. The file `bad_images.jsonl` next
    to the features lists the images without features.

  Raises:
    InputError: The checkpoint or the images cannot be used, or other features with this name exist.
  """
  if batch_size < 1:
    raise InputError(f"batch_size {batch_size}: must be at least 1")
  name = name or feature_name(checkpoint, variant)
  target = feature_set.features_folder(builder, data_dir, name)
  splits = sources.open_sources(images, builder)
  path = vision.find_checkpoint(checkpoint)
  preprocessing = choose_preprocessing(preprocessing, path)
  made_by = {
    "checkpoint_sha256": sorted(vision.checkpoint_hashes(path).values()),
    "preprocessing": preprocessing,
    "images": fingerprint_of([source.identity for source in splits.values()]) if images else "dataset",
  }
  share = share or joined_share()
  lock = f"{target.parent}.lock" if share.count == 1 else f"{target.parent}.{share.index}-of-{share.count}.lock"
  with locked(lock):  # On one machine, a share is made by one process at a time.
    found = feature_set.find_features(builder, data_dir, name, made_by)
    if found:
      _log.info("%s: features of this checkpoint and preprocessing exist; nothing to do", target)
      return found
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    tower = ImageTower(checkpoint, variant, preprocessing, batch_size, dtype)
    key = fingerprint_of(
      [made_by, dtype, builder.info.metadata["sha256"], sources.IMAGES_PER_PART, sources.ROWS_PER_PART]
    )
    parts = FeatureParts(target.parent / f"parts-{key[:16]}", tower.dim)
    _encode(tower, splits, parts, share)
    if share.joined:
      sharding.wait_for_all_processes("parts written")
    made_with = {"checkpoint": checkpoint, "variant": variant or "", "dtype": dtype, "dim": tower.dim}
    if share.index == 0 if share.joined else not _unfinished(splits, parts):
      with locked(f"{target.parent}.finish.lock"):
        if not feature_set.find_features(builder, data_dir, name, made_by):
          _finish(builder, data_dir, name, parts, made_by | made_with)
    if share.joined:
      sharding.wait_for_all_processes("features written")
    found = feature_set.find_features(builder, data_dir, name, made_by)
    if not found:
      _log.info("the parts of this process are finished; the process that finishes last writes %s", target)
    return found


def feature_name(checkpoint: str, variant: str | None) -> str:
  """Returns the name of features for which none is given: the variant, or the name of the tower's file or folder."""
  return variant or Path(checkpoint).name.removesuffix(".npz")


def _unfinished(splits: dict[str, ImageSource], parts: FeatureParts) -> bool:
  """Returns whether a part of any process is missing."""
  return any(len(parts.finished(split)) < source.num_parts for split, source in splits.items())


def _encode(tower: ImageTower, splits: dict[str, ImageSource], parts: FeatureParts, share: ProcessShare) -> None:
  """Makes this process's share of the parts that are missing."""
  own = {split: list(filter(share.has, range(source.num_parts))) for split, source in splits.items()}
  missing = {split: sorted(set(numbers) - set(parts.finished(split))) for split, numbers in own.items()}
  kept = sum(len(own[split]) - len(missing[split]) for split in splits)
  if kept:
    _log.info("%d parts were finished by an earlier run and are kept", kept)
  start, count = time.monotonic(), 0
  for split, source in splits.items():
    for number, part in tower.encode_parts(source, missing[split], split):
      parts.write(split, number, part)
      count += sum(reason is None for reason in part.reasons)
  seconds = time.monotonic() - start
  _log.info("encoded %s images in %.1f s: %.1f images/s", f"{count:,}", seconds, count / max(seconds, 1e-9))


def _finish(
  builder: tfds.core.DatasetBuilder,
  data_dir: str | os.PathLike[str],
  name: str,
  parts: FeatureParts,
  metadata: dict[str, Any],
) -> None:
  """Merges the parts to a feature set and removes them."""
  folder = feature_set.features_folder(builder, data_dir, name).parent
  merged = {split: parts.merge(split) for split in SPLITS}
  _report_bad_images(folder / BAD_IMAGES, merged)
  counts = {
    "num_images": {split: part.num_images for split, part in merged.items()},
    "num_bad_images": {split: part.num_bad_images for split, part in merged.items()},
  }
  feature_set.write_features(
    builder, data_dir, name, metadata | counts, lambda split, start, stop: merged[split].rows(start, stop)
  )
  for leftover in folder.glob("parts-*"):
    shutil.rmtree(leftover)


def _report_bad_images(path: Path, merged: dict[str, MergedParts]) -> None:
  """Writes the list of images without features, and logs how many there are for each reason."""
  reasons: dict[str, int] = {}
  with new_file(path) as work, work.open("w", encoding="utf-8") as file:
    for record in _bad_images(merged):
      reasons[record["reason"]] = reasons.get(record["reason"], 0) + 1
      file.write(json.dumps(record) + "\n")
  if reasons:
    total = sum(part.num_images + part.num_bad_images for part in merged.values())
    kinds = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    _log.warning(
      "%s of %s images have no features (%s); %s lists them", f"{sum(reasons.values()):,}", f"{total:,}", kinds, path
    )


def _bad_images(merged: dict[str, MergedParts]) -> Iterator[dict[str, Any]]:
  for split, part in merged.items():
    for row, slot, reason in part.bad_images():
      yield {"split": split, "row": row, "slot": slot, "reason": reason}
