"""Flags that the entry points of inference share: the workdir, how to load it, and how to search.

An entry point calls these functions when it is imported. absl lists the flags in its `--help`, because this module
disclaims them.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from vixml_jax import cli, compile_cache_flag
from vixml_jax.inference.rankings import RANKINGS

if TYPE_CHECKING:
  from vixml_jax.inference.predictor import Predictor
  from vixml_jax.inference.query_images import QueryImageEncoder
  from vixml_jax.inference.shared_programs import SharedPrograms
  from vixml_jax.inference.trained_encoder import TrainedEncoder

flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class SearchFlags:
  """Flags of the search; `define_search_flags` defines them."""

  search: flags.FlagHolder[str | None]
  ranking: flags.FlagHolder[str | None]
  tail: flags.FlagHolder[float]
  min_probability: flags.FlagHolder[float]
  retrieval_augmented: flags.FlagHolder[bool]
  retrieval_lambda: flags.FlagHolder[float | None]
  retrieval_temperature: flags.FlagHolder[float | None]
  index_dtype: flags.FlagHolder[str]
  dims: flags.FlagHolder[int | None]


@dataclasses.dataclass(frozen=True)
class ModelFlags:
  """Flags of the model; `define_model_flags` defines them."""

  workdir: flags.FlagHolder[str | None]
  image_checkpoint: flags.FlagHolder[str | None]
  image_batch_size: flags.FlagHolder[int]
  mesh: flags.FlagHolder[str | None]
  encoder: flags.FlagHolder[str | None]
  compile_cache: flags.FlagHolder[str | None]

  def folder(self) -> Path:
    """Returns the workdir, or the local copy of one in a bucket.

    Raises:
      InputError: `--workdir` is missing, or the bucket cannot be reached.
    """
    from vixml_jax.inference.remote_workdir import local_workdir

    return local_workdir(cli.required(self.workdir))

  def use_compile_cache(self) -> "SharedPrograms | None":
    """Keeps compiled programs as the flag says, from now on; returns what stores new ones where other servers read."""
    return compile_cache_flag.use(self.compile_cache)

  def load(
    self, search: SearchFlags | None = None, default_ranking: str | None = None, folder: Path | None = None
  ) -> "Predictor":
    """Loads the workdir as the flags say.

    Args:
      search: Flags of the search; None for plain search of the kind that the index was written for.
      default_ranking: The ranking if no flag names one; None for plain.
      folder: Local folder of the workdir; None for that of `folder`.

    Raises:
      InputError: `--workdir` is missing, another flag is wrong, or the workdir cannot be loaded.
    """
    from vixml_jax.inference.loading import load_predictor

    self.use_compile_cache()
    searching = {} if search is None else {name: flag.value for name, flag in vars(search).items()}
    if searching and searching["ranking"] is None and not searching["retrieval_augmented"]:
      searching["ranking"] = default_ranking
    return load_predictor(
      folder or self.folder(),
      mesh=cli.mesh(self.mesh),
      image_checkpoint=self.image_checkpoint.value,
      image_batch_size=self.image_batch_size.value,
      encoder=self.encoder.value,
      **searching,
    )

  def load_encoder(self) -> "tuple[TrainedEncoder, QueryImageEncoder | None]":
    """Loads the encoders of texts and of images alone, as the flags say; see `load`."""
    from vixml_jax.inference.loading import load_encoder

    self.use_compile_cache()
    return load_encoder(
      self.folder(), cli.mesh(self.mesh), self.image_checkpoint.value, self.image_batch_size.value, self.encoder.value
    )


def define_model_flags(image_batch_size: int) -> ModelFlags:
  """Defines `--workdir`, and the flags that say how to load it.

  Args:
    image_batch_size: Default of `--image_batch_size`.
  """
  return ModelFlags(
    workdir=flags.DEFINE_string("workdir", None, "Folder that vixml_jax.main wrote, or its URL in a bucket."),
    image_checkpoint=flags.DEFINE_string(
      "image_checkpoint",
      None,
      "Tower that encodes images; by default the one that made the features of the training data.",
    ),
    image_batch_size=flags.DEFINE_integer(
      "image_batch_size", image_batch_size, "Number of images that the tower encodes at a time.", lower_bound=1
    ),
    mesh=flags.DEFINE_string(
      "mesh", None, "Devices as data,fsdp,tensor, such as 4,1,2; by default as in training, or all devices."
    ),
    encoder=flags.DEFINE_enum(
      "encoder", None, ["int8"], "int8: the encoder in int8, on CPUs; it needs the extra onnx. By default as trained."
    ),
    compile_cache=compile_cache_flag.define(),
  )


def define_search_flags(default_ranking: str = "plain, by one search of their vectors") -> SearchFlags:
  """Defines `--search`, `--ranking`, and the settings of rankings.

  Args:
    default_ranking: How labels are ranked by default, for the help text.
  """
  return SearchFlags(
    search=flags.DEFINE_enum(
      "search", None, ["exact", "scann"], "Kind of search; by default the kind that the index was written for."
    ),
    ranking=flags.DEFINE_enum("ranking", None, list(RANKINGS), f"How labels are ranked; by default {default_ranking}."),
    tail=flags.DEFINE_float(
      "tail", 0.0, "How much more rare labels count when the blend ranks, 0 to 1: 0 is best for P@k, 1 for PSP@k."
    ),
    min_probability=flags.DEFINE_float(
      "min_probability", 0.0, "Labels of a lower probability are left out when the blend ranks, 0 to 1."
    ),
    retrieval_augmented=flags.DEFINE_bool("retrieval_augmented", False, "Short for --ranking=retrieval_augmented."),
    retrieval_lambda=flags.DEFINE_float(
      "retrieval_lambda",
      None,
      "Weight of labels against training queries in retrieval-augmented inference, 0 to 1; by default as in the "
      "run's evaluation.",
    ),
    retrieval_temperature=flags.DEFINE_float(
      "retrieval_temperature",
      None,
      "Temperature of retrieval-augmented inference; by default as in the run's evaluation.",
    ),
    index_dtype=flags.DEFINE_enum(
      "index_dtype",
      "float32",
      ["float32", "int8", "bit"],
      "Vectors that are held in memory for exact search: int8 takes a quarter of the memory, bit a thirtieth.",
    ),
    dims=flags.DEFINE_integer(
      "dims", None, "Number of first dimensions of the vectors to search; by default all.", lower_bound=1
    ),
  )
