"""Routes of the server: the JSON API with its OpenAPI description, health, metrics and the page."""

from collections.abc import Awaitable, Callable, Sequence
import contextlib
import inspect
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import vixml_jax
from vixml_jax.errors import InputError
from vixml_jax.serving import embeddings, schema
from vixml_jax.serving.access import Access
from vixml_jax.serving.answering import Answering, AnswerResponse, ready
from vixml_jax.serving.batching import Batcher
from vixml_jax.serving.engine import Engine, Outcome, QueryRequest, ServedModel
from vixml_jax.serving.failures import failure
from vixml_jax.serving.gate import AsgiApp, Gate
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.page_files import add_page
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_record import RequestRecord
from vixml_jax.serving.suggestions import first_categories

_FAILURES: dict[int | str, dict[str, Any]] = {
  status: {"model": schema.Failure, "description": description}
  for status, description in (
    (400, "The body is not JSON."),
    (401, "The API key is missing or wrong."),
    (408, "The body arrived too slowly."),
    (413, "The body is too large."),
    (415, "The body is not declared as JSON."),
    (422, "A field is wrong."),
    (503, "The server is starting or overloaded; try again."),
  )
}
_PREDICT, _EMBED = "/v1/predict", "/v1/embeddings"


def make_app(
  engine: Engine,
  batcher: Batcher[QueryRequest, Outcome],
  limits: Limits,
  metrics: Metrics,
  access: Access,
  observers: Sequence[Callable[[RequestRecord], None]] = (),
) -> AsgiApp:
  """Returns the application.

  Args:
    engine: Engine that answers queries; it may still be starting.
    batcher: Batcher that gathers queries for the engine.
    limits: Limits of requests.
    metrics: Metrics to record requests in, and to publish.
    access: Who may use the server.
    observers: Functions that get the record of each request after its response was sent.
  """
  app = FastAPI(
    title="vixml_jax",
    version=vixml_jax.__version__,
    description="Finds the labels of texts and images.",
    # The pages of FastAPI load scripts from other hosts.
    docs_url=None,
    redoc_url=None,
  )
  predict = _add_api(app, Answering(engine, batcher, limits), limits)
  _add_operations(app, engine, batcher, limits, metrics)
  add_page(app)
  _add_errors(app)
  for route in app.routes:  # FastAPI reads the source of a route when it is first asked for, unless that is in a cache.
    if isinstance(route, Route):
      with contextlib.suppress(OSError, TypeError):
        inspect.getsourcelines(route.endpoint)
  return Gate(_PredictFirst(app, predict), access, limits, metrics, observers)


class _PlainRoute(APIRoute):
  """A route whose function takes the request and returns the response, without the parameters that FastAPI resolves."""

  def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
    return self.endpoint


class _PredictFirst:
  """Answers queries, and passes all other requests on to FastAPI, whose routing takes as long as half an answer.

  Attributes:
    path: Path of queries.
  """

  path = _PREDICT

  def __init__(self, app: AsgiApp, predict: Callable[[Request], Awaitable[Response]]):
    self._app, self._predict = app, predict

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http" or scope["path"] != _PREDICT or scope["method"] != "POST":
      await self._app(scope, receive, send)
      return
    scope["route"] = self
    request = Request(scope, receive)
    try:
      response = await self._predict(request)
    except (RequestError, InputError) as error:
      response = failure(error, _PREDICT)
    except Exception as error:
      await failure(error, _PREDICT)(scope, receive, send)
      raise
    await response(scope, receive, send)


def _add_api(app: FastAPI, answer: Answering, limits: Limits) -> Callable[[Request], Awaitable[Response]]:
  """Adds the routes of the API and returns the function that answers queries."""
  parser, engine = answer.parser, answer.engine
  router = APIRouter(route_class=_PlainRoute)

  @router.post(_PREDICT, response_model=schema.Answers, responses=_FAILURES, openapi_extra=_body(parser.model))
  async def predict(request: Request) -> Response:
    """Returns the labels of highest score for each query."""
    queries, outcomes = await answer(request, parser.parse, list)
    found = [
      {"uid": each.query.uid, "predictions": _labels(outcome)} for each, outcome in zip(queries, outcomes, strict=True)
    ]
    return AnswerResponse(to_json({"answers": found}), media_type="application/json")

  @router.post(_EMBED, response_model=embeddings.EmbeddingList, openapi_extra=_body(embeddings.EmbeddingsRequest))
  async def embed(request: Request) -> Response:
    """Returns the embeddings of texts, as OpenAI's API does."""
    parse = lambda body, model: embeddings.parse_texts(body, model, limits)
    texts, outcomes = await answer(request, parse, lambda parsed: parsed.queries)
    return AnswerResponse(texts.response([outcome.embedding for outcome in outcomes]), media_type="application/json")

  app.include_router(router)

  @app.get("/v1/models")
  def models() -> embeddings.ModelList:
    """Returns the only model of the server."""
    return embeddings.ModelList(data=[_describe_model(ready(engine))])

  @app.get("/v1/models/{name}")
  def model(name: str) -> embeddings.ServedModelInfo:
    """Returns the model of a name."""
    served = ready(engine)
    embeddings.check_model(name, served)
    return _describe_model(served)

  @app.get("/v1/labels/{uid:path}", responses={404: {"model": schema.Failure, "description": "No such label."}})
  def label(uid: str) -> schema.Label:
    """Returns the label of a uid."""
    labels = ready(engine).labels
    try:
      (found,) = labels.ids_of([uid]).tolist()
    except InputError as error:
      raise RequestError(404, "there is no such label", "uid") from error
    return schema.Label(label=uid, id=found, text=labels.texts([found])[0])

  @app.get("/v1/suggestions")
  def suggestions() -> schema.Suggestions:
    """Returns queries to try, and categories to choose from."""
    model = ready(engine)
    return schema.Suggestions(queries=model.examples, categories=first_categories(model.labels))

  describe = app.openapi

  def openapi() -> dict[str, Any]:
    described = describe()
    models = [(parser.model, "validation"), (embeddings.EmbeddingsRequest, "validation")]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    described["components"]["schemas"] |= definitions["$defs"]
    return described

  app.openapi = openapi  # type: ignore[method-assign]
  return predict


def _labels(outcome: Outcome) -> list[dict[str, Any]]:
  """Returns the JSON of the labels of a query."""
  if outcome.why is None:
    return [label._asdict() for label in outcome.labels]
  return [label._asdict() | {"why": why} for label, why in zip(outcome.labels, outcome.why, strict=True)]


def _body(model: type) -> dict[str, Any]:
  """Returns the description of a request's body."""
  reference = {"$ref": f"#/components/schemas/{model.__name__}"}
  return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _describe_model(model: ServedModel) -> embeddings.ServedModelInfo:
  return embeddings.ServedModelInfo(id=model.name, created=model.created)


def _add_operations(
  app: FastAPI, engine: Engine, batcher: Batcher[QueryRequest, Outcome], limits: Limits, metrics: Metrics
) -> None:
  metrics.queue_queries.set_function(lambda: len(batcher))

  @app.get("/readyz", responses={503: {"model": schema.Health, "description": "The server is starting."}})
  async def ready(response: Response) -> schema.Health:
    """Says whether the model is loaded and every program is compiled, so that queries are answered."""
    described = await health()
    response.status_code = 200 if described.status == "ready" else 503
    return described

  @app.get("/healthz")
  async def health() -> schema.Health:
    """Says that the server runs, and which model it has."""
    if not batcher.alive:
      raise RequestError(500, "the thread that answers queries has ended; restart the server")
    model = engine.model
    if model is None:
      return schema.Health(status="starting")
    encoder = model.predictor.encoder
    return schema.Health(
      status="ready",
      step=encoder.checkpoint["step"],
      labels=model.labels.num_live,
      search=model.labels.search_kind,
      ranking=model.rankings.default.name,
      ranking_reason=model.rankings.default.reason,
      rankings=list(model.rankings.predictors),
      retrieval_augmented=model.predictor.retrieval is not None,
      texts=list(encoder.config.dataset.text_fields),
      images=encoder.images,
      pictures=model.reads_images,
      max_k=min(limits.k, model.labels.num_live),
      explain=model.explains,
    )

  @app.get("/metrics", response_class=Response)
  def measurements() -> Response:
    """Returns counts and times, for Prometheus."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:

  @app.exception_handler(RequestError)
  @app.exception_handler(InputError)
  @app.exception_handler(HTTPException)
  @app.exception_handler(Exception)
  async def on_error(request: Request, error: Exception) -> Response:
    return failure(error, request.url.path)
