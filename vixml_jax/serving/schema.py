"""The JSON of requests and responses; the OpenAPI description is generated from it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vixml_jax.serving.limits import Limits

_MAX_NUMBERS = 16_384  # Size of a feature vector; those of towers have a tenth of it.


class Label(BaseModel):
  """A label of the index."""

  label: str = Field(description="Uid of the label.")
  id: int = Field(description="Row of the label in the index.")
  text: str


class Neighbor(BaseModel):
  """A training query that is similar to the query."""

  row: int = Field(description="Its row in the training data.")
  text: str | None = Field(
    description="The first 200 characters of its text; null if the index or the server leaves texts out."
  )
  score: float = Field(description="Cosine of both queries.")
  words: list[str] = Field(description="Words that both have; empty if the answer has no texts and the index no blend.")
  labels: list[Label] = Field(description="Its first labels.")


class Why(BaseModel):
  """Why a label was found."""

  words: list[str] = Field(description="Words that the query and the label's text have in common.")
  neighbors: list[Neighbor] = Field(description="The nearest training queries that have the label.")


class ScoredLabel(Label):
  """A label that was found for a query."""

  score: float = Field(
    description="Cosine; with retrieval augmentation a share of probability; with the blend a probability."
  )
  why: Why | None = Field(default=None, description="Only if the request has explain.")


class Answer(BaseModel):
  """The labels of one query, best first."""

  uid: str | None = Field(description="Uid that the query has in the request.")
  predictions: list[ScoredLabel]


class Answers(BaseModel):
  """One answer for each query, in the order of the queries."""

  answers: list[Answer]


class Health(BaseModel):
  """Whether the server answers queries, and with which model."""

  status: Literal["starting", "ready"]
  step: int | None = Field(default=None, description="Step of the checkpoint.")
  labels: int | None = Field(default=None, description="Number of labels that can be found.")
  search: str | None = None
  ranking: str | None = Field(default=None, description="The ranking of requests that name none.")
  ranking_reason: str | None = Field(default=None, description="Why it is the default.")
  rankings: list[str] | None = Field(default=None, description="The rankings that a request may name.")
  retrieval_augmented: bool | None = None
  texts: list[str] | None = Field(default=None, description="Fields of a query that the model reads.")
  images: int | None = Field(default=None, description="Maximum number of images of a query that the model uses.")
  pictures: bool | None = Field(
    default=None, description="Whether images may be image files; otherwise they must be feature vectors."
  )
  max_k: int | None = Field(default=None, description="Largest number of labels that a query gets.")
  explain: bool | None = Field(default=None, description="Whether requests may have explain.")


class Suggestions(BaseModel):
  """What a user may start with."""

  queries: list[str] = Field(description="Texts of labels that many training queries have.")
  categories: list[str] = Field(description="The first categories of the index.")


class Error(BaseModel):
  """What is wrong with a request."""

  field: str | None = Field(description="The field that is wrong, such as queries[3].images[0].")
  message: str


class Failure(BaseModel):
  """The body of every response that is an error."""

  error: Error


class Strict(BaseModel):
  """A model that accepts only the declared keys, with values of the declared types.

  Pydantic keeps other keys, and `RequestParser` refuses them: pydantic itself would make an error of each of a million.
  """

  model_config = ConfigDict(extra="allow", strict=True, json_schema_extra={"additionalProperties": False})


def request_model(limits: Limits) -> type[Strict]:
  """Returns the model of the body of `POST /v1/predict`, with the limits in it."""
  text = Annotated[str, Field(max_length=limits.text_chars)]
  names = Annotated[list[text], Field(fail_fast=True, max_length=limits.names)]
  share = Annotated[float, Field(ge=0, le=1)]
  vector = Annotated[list[float], Field(fail_fast=True, max_length=_MAX_NUMBERS)]
  image_list = Annotated[list[str | vector], Field(fail_fast=True, max_length=limits.images)]

  class PredictQuery(Strict):
    """One query. Its filters replace those of the request."""

    uid: text | None = Field(default=None, description="Returned with the answer.")
    title: text
    content: text | None = None
    images: image_list | None = Field(
      None, description="PNG, JPEG, WebP, GIF or BMP files in base64, alone or as data: URLs; or feature vectors."
    )
    allow: names | None = Field(default=None, description="Uids of the only labels that the query may have.")
    deny: names | None = Field(default=None, description="Uids of labels that the query may not have.")
    categories: names | None = Field(default=None, description="The only categories whose labels the query may have.")

  class PredictRequest(Strict):
    """Queries, and filters for all of them."""

    queries: Annotated[list[PredictQuery], Field(fail_fast=True, min_length=1, max_length=limits.queries)]
    k: Annotated[int, Field(ge=1, le=limits.k)] = Field(
      default=10, description="Number of labels for each query; at most as many as there are, see /healthz."
    )
    allow: names | None = Field(default=None, description="For queries without their own allow.")
    deny: names | None = Field(default=None, description="For queries without their own deny.")
    categories: names | None = Field(default=None, description="For queries without their own categories.")
    ranking: Literal["plain", "retrieval_augmented", "blend"] | None = Field(
      default=None, description="How labels are ranked; by default as /healthz says, which also names those on offer."
    )
    tail: share | None = Field(default=None, description="For the blend: how much more rare labels count.")
    min_probability: share | None = Field(
      default=None, description="For the blend: labels of a lower probability are left out."
    )
    explain: bool = Field(default=False, description="Whether to say for each label why it was found.")

  return PredictRequest
