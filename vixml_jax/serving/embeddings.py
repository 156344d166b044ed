"""Embeddings of texts in the form of OpenAI's API, `POST /v1/embeddings`."""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field
from pydantic_core import from_json, to_json

from vixml_jax.inference.queries import Query
from vixml_jax.search.prefixes import scaled_prefix
from vixml_jax.serving.engine import QueryRequest, ServedModel
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.request_error import RequestError, shortened
from vixml_jax.serving.request_parser import check_values


class EmbeddingsRequest(BaseModel):
  """A request for embeddings."""

  input: str | list[str] = Field(description="A text, or several. Lists of token ids are refused.")
  model: str = Field(description="Name of the model, as GET /v1/models gives it.")
  encoding_format: Literal["float", "base64"] = "float"
  dimensions: int | None = Field(
    default=None, description="Number of first values to return, one that the model was trained for; by default all."
  )
  user: str | None = Field(default=None, description="Ignored.")


class Embedding(BaseModel):
  """The embedding of a text."""

  object: Literal["embedding"] = "embedding"
  index: int
  embedding: list[float] | str = Field(description="Numbers of unit norm, or little-endian float32 in base64.")


class Usage(BaseModel):
  """Number of tokens of the texts, as the model reads them."""

  prompt_tokens: int
  total_tokens: int


class EmbeddingList(BaseModel):
  """Embeddings, in the order of the texts."""

  object: Literal["list"] = "list"
  data: list[Embedding]
  model: str
  usage: Usage


class ServedModelInfo(BaseModel):
  """A model of the server."""

  id: str = Field(description="Name of the workdir.")
  object: Literal["model"] = "model"
  created: int = Field(description="When its checkpoint was written, in seconds since 1970.")
  owned_by: str = "vixml_jax"


class ModelList(BaseModel):
  """The models of the server."""

  object: Literal["list"] = "list"
  data: list[ServedModelInfo]


@dataclasses.dataclass(frozen=True)
class TextsToEmbed:
  """A checked request.

  Attributes:
    queries: The texts, for the queue.
    model: Name of the model.
    in_base64: Whether embeddings are sent in base64.
    dims: Number of first values of each embedding that are sent, at unit norm; None for all.
  """

  queries: list[QueryRequest]
  model: str
  in_base64: bool
  dims: int | None = None

  def response(self, embeddings: Sequence[np.ndarray]) -> bytes:
    """Returns the JSON of an `EmbeddingList`, given the embedding float32 [D] of each text."""
    if self.dims is not None:
      embeddings = [*scaled_prefix(np.stack(embeddings), self.dims)]
    tokens = sum(len(query.tokens) for query in self.queries)
    return to_json(
      {
        "object": "list",
        "data": [
          {"object": "embedding", "index": i, "embedding": self._encoded(embedding)}
          for i, embedding in enumerate(embeddings)
        ],
        "model": self.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
      }
    )

  def _encoded(self, embedding: np.ndarray) -> str | list[float]:
    if self.in_base64:
      return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    return embedding.tolist()


def parse_texts(body: bytes, model: ServedModel, limits: Limits) -> TextsToEmbed:
  """Returns the texts of the body of `POST /v1/embeddings`, tokenized.

  Raises:
    RequestError: The body is wrong; the message says what to change.
  """
  check_values(body, limits)
  try:
    given = from_json(body, allow_inf_nan=False)
  except ValueError as error:
    raise RequestError(400, f"the body is not JSON in UTF-8: {error}") from error
  if not isinstance(given, dict):
    raise RequestError(400, "the body must be a JSON object with input and model")
  for key in given:
    if key not in EmbeddingsRequest.model_fields:
      raise RequestError(400, f"is not known; known are {', '.join(EmbeddingsRequest.model_fields)}", shortened(key))
  check_model(given.get("model"), model)
  encoding = given.get("encoding_format")
  if encoding not in (None, "float", "base64"):
    raise RequestError(400, "must be float or base64", "encoding_format")
  dims = _dims(given, model)
  texts = _texts(given, limits)
  tokens = model.predictor.encoder.tokenizer(texts)
  queries = [QueryRequest(Query(text), tokens[i], embed=True) for i, text in enumerate(texts)]
  return TextsToEmbed(queries, model.name, encoding == "base64", dims)


def check_model(name: Any, model: ServedModel) -> None:
  """Checks the name of a model.

  Raises:
    RequestError: The server has no such model.
  """
  if not isinstance(name, str):
    raise RequestError(400, f"must be the name of a model, {model.name!r}", "model")
  if name != model.name:
    raise RequestError(404, f"there is no model {shortened(name)!r}; this server has {model.name!r}", "model")


def _dims(given: Mapping[str, Any], model: ServedModel) -> int | None:
  """Returns the number of first values to send; None for whole embeddings."""
  whole, dims = model.labels.dim, given.get("dimensions")
  if dims in (None, whole):
    return None
  trained = [each for each in model.predictor.encoder.config.train.matryoshka_dims if each != whole]
  if dims in trained:
    return int(dims)  # JSON may have 96.0.
  if not trained:
    raise RequestError(400, f"must be {whole}, the dimension of the model", "dimensions")
  others = ", ".join(map(str, trained))
  raise RequestError(
    400, f"must be {whole}, the dimension of the model, or one that it was trained for: {others}", "dimensions"
  )


def _texts(given: Mapping[str, Any], limits: Limits) -> list[str]:
  texts = given.get("input")
  texts = [texts] if isinstance(texts, str) else texts
  if not isinstance(texts, list) or not texts:
    raise RequestError(400, "must be a text or a list of texts", "input")
  if len(texts) > limits.queries:
    raise RequestError(400, f"has {len(texts)} texts; send at most {limits.queries} in a request", "input")
  for i, text in enumerate(texts):
    if isinstance(text, int | list):
      raise RequestError(400, "token ids are not accepted, because tokenizers differ; send texts", f"input[{i}]")
    if not isinstance(text, str):
      raise RequestError(400, "must be a text", f"input[{i}]")
    if not text.strip():
      raise RequestError(400, "is empty; send a text", f"input[{i}]")
    if len(text) > limits.text_chars:
      raise RequestError(400, f"has more than {limits.text_chars} characters; send a shorter text", f"input[{i}]")
  return texts
