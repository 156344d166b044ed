"""A trained model: it answers queries, encodes, is evaluated, takes new labels and is saved."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.api.dataset import Dataset, LabeledQuery
from vixml_jax.api.scoring import Labeled, score
from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import PRECISION_KS, RECALL_KS
from vixml_jax.files import read_json_object
from vixml_jax.inference.label_files import label_format
from vixml_jax.inference.loading import load_predictor, with_ranking
from vixml_jax.inference.new_labels import change_labels
from vixml_jax.inference.predictions import Prediction
from vixml_jax.inference.predictor import GivenQuery, Predictor
from vixml_jax.inference.remote_workdir import local_workdir
from vixml_jax.remote import is_remote
from vixml_jax.run.bucket_workdir import open_workdir
from vixml_jax.run.saved_model import save_for_inference
from vixml_jax.run.workdir import FINAL_METRICS, INDEX, REPORT


class Model:
  """A trained model; `train` and `load` return it.

  Among several processes (`jax.distributed`), each has a model of its own on its own devices. Only process 0 may change
  or save it.

  Args:
    predictor: Encoder and label index of a workdir.
    url: URL of the workdir if it is in a bucket; the predictor then reads a local copy.

  Examples:
    >>> model = vixml_jax.load(workdir)
    >>> model
    Model('run', labels=24, ranking='plain')
    >>> [len(labels) for labels in model.predict(["arrow circle", "sun"], k=2)]
    [2, 2]
  """

  def __init__(self, predictor: Predictor, url: str | None = None):
    self._predictor, self._url = predictor, url
    self._other_rankings: dict[str, Predictor] = {}

  def __repr__(self) -> str:
    return f"Model({self._url or str(self.workdir)!r}, labels={self.num_labels}, ranking={self.ranking!r})"

  @property
  def workdir(self) -> Path:
    """Folder of the run, or the one that `save` made; of a run in a bucket, the local copy that the model reads."""
    return self._predictor.encoder.workdir

  @property
  def num_labels(self) -> int:
    """Number of labels, without deleted ones."""
    return self._predictor.index.num_live

  @property
  def ranking(self) -> str:
    """How labels are ranked by default: "plain", "retrieval_augmented" or "blend"."""
    return self._predictor.ranking

  @functools.cached_property
  def metrics(self) -> dict[str, float]:
    """Metrics of the run on its test queries in percent, the contents of `final_metrics.json`.

    Those with retrieval augmentation begin with `RA/`, those of the blend with `blend/`.

    Raises:
      InputError: The file is missing or damaged.
    """
    path = self.workdir / FINAL_METRICS
    again = f"run python -m vixml_jax.evaluate --workdir={self.workdir} to write it again"
    return read_json_object(path, absent=again, damaged=again)

  @property
  def report(self) -> Path:
    """Path of the report of the run, an HTML page."""
    return self.workdir / REPORT

  def predict(
    self, queries: Sequence[GivenQuery], k: int = 10, *, ranking: str | None = None
  ) -> list[list[Prediction]]:
    """Returns the k best labels of each query.

    Args:
      queries: Each a text, or a dict with `title` and optionally `content`, `images` (a list of paths, bytes, Pillow
        images or feature vectors [F]), `allow` and `deny` (lists of uids of labels) and `categories`.
      k: Number of labels, at least 1; at most `num_labels` are returned.
      ranking: "plain", "retrieval_augmented" or "blend", by the settings of the run; None for that of `load`.

    Returns:
      For each query its labels, best first; each has `label` (its uid), `id`, `text` and `score`. There are fewer than
      k if filters leave fewer; with retrieval augmentation, if fewer have a share of probability; and with the blend,
      if there are fewer candidates.

    Raises:
      InputError: A query is wrong (the message names its position from 0), or k or the ranking is.

    Examples:
      >>> found = model.predict(["arrow circle", {"title": "sun", "deny": ["label/8"]}], k=3)
      >>> [len(labels) for labels in found]
      [3, 3]
      >>> [label.text for label in model.predict(["arrow circle"], k=1, ranking="blend")[0]]
      ['circle bell']
    """
    return self._with_ranking(ranking).predict(queries, k)

  def encode(self, items: Sequence[GivenQuery]) -> np.ndarray:
    """Returns the embeddings of queries.

    Args:
      items: Each a text, or a dict with `title` and optionally `content` and `images`.

    Returns:
      float32 [items, D], unit norm.

    Raises:
      InputError: An item is wrong; the message names its position from 0.

    Examples:
      >>> model.encode(["arrow up", "sun"]).shape
      (2, 32)
    """
    return self._predictor.encode(items)

  def evaluate(
    self,
    queries: Dataset | Sequence[GivenQuery],
    labels: Sequence[Sequence[str]] | None = None,
    *,
    ranking: str | None = None,
    ks: Sequence[int] = PRECISION_KS,
    recall_ks: Sequence[int] = RECALL_KS,
  ) -> dict[str, float]:
    """Returns metrics on labeled queries. `metrics` has those of the run.

    Args:
      queries: Queries as for `predict`, or a data set, whose test queries are used.
      labels: Uids of the correct labels of each query; None with a data set.
      ranking: As for `predict`.
      ks: Values of k for P@k, nDCG@k, PSP@k and PSnDCG@k.
      recall_ks: Values of k for R@k.

    Returns:
      Each metric in percent, by names such as `P@1`. PSP and PSnDCG are left out if the label index has no training
      queries, whose labels say which labels are rare.

    Raises:
      InputError: A query is wrong, or the model does not know a label; the message names the position from 0.

    Examples:
      >>> found = model.evaluate(["arrow circle", "sun"], [["label/0"], ["label/8", "label/2"]])
      >>> sorted(found)[:4], 0 <= found["P@1"] <= 100
      (['Hit@1', 'Hit@10', 'Hit@100', 'Hit@3'], True)
    """
    if isinstance(queries, Dataset):
      if labels is not None:
        raise InputError("labels: must not be given with a data set, which has its own")
      labeled: Iterable[Labeled] = self._readable(queries.queries("test"))
    else:
      if labels is None or len(labels) != len(queries):
        raise InputError(f"labels: must have one list of uids for each of the {len(queries)} queries")
      labeled = zip(queries, labels, strict=True)
    return score(self._with_ranking(ranking), labeled, ks=ks, recall_ks=recall_ks)

  def add_labels(self, labels: Sequence[Mapping[str, Any]], *, replace: bool = False) -> None:
    """Adds labels without training. They are written to the label index of the workdir, and the next query finds them.

    Args:
      labels: Each a dict with `uid` and `title`, and optionally `content`, `images`, `categories` and `positives`:
        queries that have the label, each a text or a dict. Positives make a label much easier to find.
      replace: Whether a label may have the uid of an existing one, which is then deleted.

    Raises:
      InputError: A label is wrong (the message names its position from 0), its uid exists and `replace` is False, or
        this is not process 0.

    Examples:
      >>> model.add_labels([{"uid": "otter", "title": "horse fish", "positives": ["brown horse fish"]}])
      >>> model.predict(["brown horse fish"], k=1, ranking="retrieval_augmented")[0][0].label
      'otter'
    """
    _check_first_process("add_labels")
    form, index = label_format(self._predictor.encoder.config), self._predictor.index
    new = [form.parse(label, f"label {number}") for number, label in enumerate(labels)]
    known = {
      label.uid: label.where for label, taken in zip(new, index.has([label.uid for label in new]), strict=True) if taken
    }
    for uid, where in known.items():
      if not replace:
        raise InputError(f"{where}: uid {uid!r} belongs to a label of {index.folder}; use another uid, or replace=True")
    self._change(new, known)

  def delete_labels(self, uids: Sequence[str]) -> None:
    """Deletes labels permanently from the label index of the workdir.

    Args:
      uids: Uids of the labels.

    Raises:
      InputError: A uid is unknown, or its label was deleted before (the message names its position from 0), or this is
        not process 0.

    Examples:
      >>> model.delete_labels(["otter"])
      >>> model.num_labels
      24
    """
    _check_first_process("delete_labels")
    if isinstance(uids, str):
      raise InputError("uids: must be a list of uids; put a single one into brackets")
    self._change([], {uid: f"uid {number}" for number, uid in enumerate(uids)})

  def save(self, folder: str | os.PathLike[str]) -> Path | str:
    """Copies what inference needs to a folder that `load` reads: no training state, embeddings or training data.

    The tower that encodes images is not copied, nor is a frozen language model; both are found where they are.

    Args:
      folder: Folder to make, or its URL in a bucket.

    Returns:
      The folder.

    Raises:
      InputError: The folder exists, the bucket cannot be written, the disk is full, or this is not process 0.

    Examples:
      >>> vixml_jax.load(model.save(tmp / "saved"))
      Model('...saved', labels=24, ranking='plain')
    """
    _check_first_process("save")
    step, index = self._predictor.encoder.checkpoint["step"], self._predictor.index.folder
    return save_for_inference(self.workdir, step, folder, index=index)

  def _readable(self, queries: Iterable[LabeledQuery]) -> Iterator[Labeled]:
    """Yields queries of a data set without images if the model takes none."""
    skipped = () if self._predictor.encoder.images else ("images",)
    for query, labels in queries:
      yield {key: value for key, value in query.items() if key not in skipped}, labels

  def _with_ranking(self, ranking: str | None) -> Predictor:
    """Returns the predictor of a ranking; a ranking is opened once for each snapshot of the index."""
    if ranking is None or ranking == self.ranking:
      return self._predictor
    if ranking not in self._other_rankings:
      self._other_rankings[ranking] = with_ranking(self._predictor, ranking)
    return self._other_rankings[ranking]

  def _change(self, new: Sequence[Any], delete: Mapping[str, str]) -> None:
    """Writes the next snapshot of the index and opens it."""
    if self._url is None:
      index = change_labels(self._predictor.index, self._predictor, new, delete, {})
    else:
      with open_workdir(self._url, exists=True) as opened:
        predictor = self._predictor.with_index(self._predictor.index.in_folder(opened.folder / INDEX))
        index = change_labels(predictor.index, predictor, new, delete, {})
    self._predictor, self._other_rankings = self._predictor.with_index(index), {}


def _check_first_process(method: str) -> None:
  """Raises an InputError in all processes but the first: two must not write the same files."""
  if jax.process_index() > 0:
    raise InputError(
      f"{method}: this is process {jax.process_index()}, and only process 0 writes; call it if jax.process_index() == 0"
    )


def load(
  workdir: str | os.PathLike[str],
  search: str | None = None,
  retrieval_augmented: bool = False,
  mesh: Mesh | None = None,
  *,
  ranking: str | None = None,
  tail: float = 0.0,
  min_probability: float = 0.0,
  retrieval_lambda: float | None = None,
  retrieval_temperature: float | None = None,
  image_checkpoint: str | None = None,
  image_batch_size: int = 8,
  encoder: str | None = None,
  index_dtype: str = "float32",
  dims: int | None = None,
) -> Model:
  """Loads a trained model from the folder of a run, or from one that `Model.save` made. No training data are needed.

  Args:
    workdir: The folder, or its URL in a bucket, of which what inference needs is copied to the cache.
    search: "exact" (on the devices) or "scann" (approximate, on the CPU); None for the kind that the index was written
      for.
    retrieval_augmented: Short for `ranking="retrieval_augmented"`.
    mesh: Devices to use; None for all devices, in the layout of training if that fits their number.
    ranking: How labels are ranked: "plain" by the inner product of their vectors with the query, "retrieval_augmented"
      with the labels of similar training queries, or "blend" by a probability that a trained model gives them. The
      blend has the highest precision and takes the most time. None for "plain".
    tail: 0 to 1, for the blend: how much more rare labels count. 0 is best for precision, 1 for propensity-scored
      precision.
    min_probability: For the blend: labels of a lower probability are left out.
    retrieval_lambda: Weight of the labels against that of the training queries; None for that of the run's evaluation.
    retrieval_temperature: Temperature of retrieval; None for that of the run's evaluation.
    image_checkpoint: Tower that encodes images; None for the one that made the features of the training data.
    image_batch_size: Number of images that the tower encodes at a time. A smaller batch takes as long as a full one.
    encoder: "int8" for an encoder in int8 on the CPU, which needs the extra `onnx`; None for the encoder as trained.
    index_dtype: Vectors that are held in memory for search: "float32", "int8" (a quarter of the memory, the same
      results) or "bit" (a thirtieth; some labels may be missed). Codes need exact search; the best labels by codes
      are scored again with the float32 vectors, which stay on disk.
    dims: Number of first dimensions of the vectors to search, at unit norm; None for all. The model should have been
      trained with it among `train.matryoshka_dims`. The blend needs all.

  Returns:
    The model.

  Raises:
    InputError: A file is missing, damaged, or of another checkpoint.

  Examples:
    >>> vixml_jax.load(workdir, ranking="blend").ranking
    'blend'
  """
  url = str(workdir) if is_remote(workdir) else None
  return Model(
    load_predictor(
      local_workdir(os.fspath(workdir)),
      search,
      retrieval_augmented,
      mesh,
      ranking=ranking,
      tail=tail,
      min_probability=min_probability,
      retrieval_lambda=retrieval_lambda,
      retrieval_temperature=retrieval_temperature,
      image_checkpoint=image_checkpoint,
      image_batch_size=image_batch_size,
      encoder=encoder,
      index_dtype=index_dtype,
      dims=dims,
    ),
    url,
  )
