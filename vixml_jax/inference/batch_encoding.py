"""Writes the embeddings of a file of items as Parquet files, block by block, in one process or several."""

from pathlib import Path, PurePosixPath
import time
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.inference.block_job import ResultFiles
from vixml_jax.inference.block_runner import BatchFile, BlockAnswer, TokenizedBlock, run_batch
from vixml_jax.inference.block_timings import BlockTimings
from vixml_jax.inference.query_images import QueryImageEncoder, UnreadableImage, image_vectors
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.search.vector_form import VectorForm


def encode_file(
  encoder: TrainedEncoder,
  image_encoder: QueryImageEncoder | None,
  batch: BatchFile,
  output: str,
  *,
  dtype: str,
  dims: int | None = None,
) -> dict[str, Any]:
  """Writes the embeddings of a file of items, statistics, and a list of images that could not be read.

  It resumes as `predict_file` does, and processes divide the blocks in the same way.

  Args:
    encoder: Encoder of the items.
    image_encoder: Encoder of their images; None for a model of texts only.
    batch: The file of items. Filters of queries are ignored.
    output: Path or URL of the folder to write, with a Parquet file for each block. The columns are `row` (from 0),
      `uid`, and `embedding`, a list of fixed size and unit norm. `OUTPUT.stats.json` and `OUTPUT.bad_images.jsonl`
      are written next to it.
    dtype: Type of the embeddings, "float32" or "float16".
    dims: Number of first dimensions to write, at unit norm, at most D; None for all. The model should have been trained
      with it among `train.matryoshka_dims`.

  Returns:
    Statistics as for `predict_file`, of encoding only.

  Raises:
    InputError: As for `predict_file`; or the output exists and is something else.
  """
  settings: dict[str, Any] = {"embeddings": dtype, "mesh": dict(encoder.mesh.shape), "platform": jax.default_backend()}
  if dims is not None:
    settings["dims"] = dims
  files = ResultFiles(PurePosixPath(output).name, "embeddings.", ".parquet", None)
  return run_batch(
    _Encoding(encoder, image_encoder, dtype, VectorForm(dims=dims)), batch, output, files, settings | encoder.settings()
  )


class _Encoding:
  """Encodes blocks."""

  name = "encode"

  def __init__(self, encoder: TrainedEncoder, image_encoder: QueryImageEncoder | None, dtype: str, form: VectorForm):
    self.tokenizer = encoder.tokenizer
    self._encoder, self._image_encoder, self._dtype = encoder, image_encoder, dtype
    self._form, self._timings = form, BlockTimings()

  def answer(self, block: TokenizedBlock) -> BlockAnswer:
    """Returns the embeddings [Q, dims]."""
    bad: list[UnreadableImage] = []
    started = time.perf_counter()
    vectors = None if self._image_encoder is None else image_vectors(self._image_encoder, block.queries, bad)
    embeddings = self._encoder.embed(block.tokens, vectors, whole_chunks=True)
    embeddings = np.asarray(self._form.queries(embeddings))
    self._timings.add(started, len(block.queries))
    return BlockAnswer((embeddings,), bad)

  def write(self, path: Path, first_row: int, block: TokenizedBlock, answer: BlockAnswer) -> None:
    """Writes a Parquet file."""
    (embeddings,) = answer.arrays
    values = pa.array(embeddings.astype(self._dtype).ravel())
    columns = {
      "row": pa.array(np.arange(first_row, first_row + len(embeddings))),
      "uid": pa.array([query.uid for query in block.queries], pa.string()),
      "embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1]),
    }
    # Neither a dictionary nor compression makes embeddings smaller.
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=["row"])

  def statistics(self) -> dict[str, Any]:
    """Returns what `encode_file` describes."""
    return {
      "dtype": self._dtype,
      "devices": f"{self._encoder.mesh.size} x {jax.devices()[0].device_kind}",
      "encode": self._timings.summary(),
    }
