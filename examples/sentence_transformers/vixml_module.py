"""A trained workdir as a model of sentence-transformers that encodes texts, images, and texts with images.

  from sentence_transformers import SentenceTransformer
  from vixml_module import VixmlModule

  model = SentenceTransformer(modules=[VixmlModule("runs/quickstart")])
  model.encode(["wifi off", {"text": "wifi off", "image": "wifi.png"}, Image.open("wifi.png")])

It encodes with vixml_jax and without gradients: for the evaluators, search and mining of sentence-transformers, not for
training. It needs no trust_remote_code, because the program that uses it imports the class.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules.input_module import InputModule
import torch

from vixml_jax.inference.loading import load_predictor


class VixmlModule(InputModule):
  """Encodes with the model of a workdir.

  Args:
    workdir: Folder that training wrote.
    **options: Further arguments of `vixml_jax.load`, such as `image_checkpoint`.
  """

  def __init__(self, workdir: str | Path, **options: Any):
    super().__init__()
    self._predictor = load_predictor(workdir, **options)

  @property
  def modalities(self) -> list[Any]:
    """The kinds of inputs: a text, an image, or a dict with both. "message" stands for batches of several kinds."""
    images = self._predictor.encoder.images
    return ["text", "image", ("image", "text"), "message"] if images else ["text"]

  def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """Returns the inputs as queries of vixml_jax; the image of a dict may be a list of images."""
    return {"queries": [self._query(given, prompt or "") for given in inputs]}

  def _query(self, given: Any, prompt: str) -> dict[str, Any]:
    kind = infer_modality(given, self.modalities)
    if kind == "message":
      raise ValueError("chat messages are not supported: pass a text, an image, or {'text': ..., 'image': ...}")
    parts = given if isinstance(given, dict) else {kind: given}
    images = parts.get("image", [])
    query = {"title": prompt + parts.get("text", "")}
    return query | ({"images": images if isinstance(images, list) else [images]} if "image" in parts else {})

  def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Adds the embeddings, float32 [batch, D] of unit norm."""
    return features | {"sentence_embedding": torch.from_numpy(self._predictor.encode(features["queries"]).copy())}

  def get_embedding_dimension(self) -> int:
    """Returns D."""
    return self._predictor.encoder.definition.embed_dim

  def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
    """Refuses: the workdir is the model, and `vixml_jax.export` writes folders for others."""
    raise NotImplementedError("keep the workdir instead; python -m vixml_jax.export writes a folder that encodes texts")
