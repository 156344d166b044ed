"""Routes of the server: the JSON API with its OpenAPI description, health, metrics and the page."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

import vixml_jax
from vixml_jax.errors import InputError
from vixml_jax.inference.predictions import Prediction
from vixml_jax.serving import schema
from vixml_jax.serving.batching import Batcher, QueueFull
from vixml_jax.serving.engine import Engine, QueryRequest, ServedModel
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_parser import RequestParser, is_quick

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
  "/": ("page.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
}
# The page loads nothing from other hosts, and no text of a data set can run a script.
_PAGE_HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  "X-Content-Type-Options": "nosniff",
  "Cache-Control": "no-cache",
}
_FAILURES: dict[int | str, dict[str, Any]] = {
  status: {"model": schema.Failure, "description": description}
  for status, description in (
    (400, "The body is not JSON."),
    (408, "The body arrived too slowly."),
    (413, "The body is too large."),
    (422, "A field is wrong."),
    (503, "The server is starting or overloaded; try again."),
  )
}
_LINGER_SECONDS = 5.0
_PREDICT = "/v1/predict"

_AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def make_app(
  engine: Engine, batcher: Batcher[QueryRequest, list[Prediction]], limits: Limits, metrics: Metrics
) -> _AsgiApp:
  """Returns the application.

  Args:
    engine: Engine that answers queries; it may still be starting.
    batcher: Batcher that gathers queries for the engine.
    limits: Limits of requests.
    metrics: Metrics to record requests in, and to publish.
  """
  app = FastAPI(
    title="vixml_jax",
    version=vixml_jax.__version__,
    description="Finds the labels of texts and images.",
    # The pages of FastAPI load scripts from other hosts.
    docs_url=None,
    redoc_url=None,
  )
  predict = _add_api(app, engine, batcher, limits)
  _add_operations(app, engine, batcher, limits, metrics)
  _add_page(app)
  _add_errors(app)
  return _CountRequests(_PredictFirst(app, predict), metrics)


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

  def __init__(self, app: _AsgiApp, predict: Callable[[Request], Awaitable[Response]]):
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
      response = _failure(error)
    except Exception as error:
      await _failure(error)(scope, receive, send)
      raise
    await response(scope, receive, send)


def _ready(engine: Engine) -> ServedModel:
  if engine.model is None:
    raise RequestError(503, "the model is being loaded; try again")
  return engine.model


def _add_api(
  app: FastAPI, engine: Engine, batcher: Batcher[QueryRequest, list[Prediction]], limits: Limits
) -> Callable[[Request], Awaitable[Response]]:
  """Adds the routes of the API and returns the function that answers queries."""
  parser = RequestParser(limits)
  pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="parser")  # Bounds the images decoded at a time.

  router = APIRouter(route_class=_PlainRoute)

  @router.post(
    _PREDICT,
    response_model=schema.Answers,
    responses=_FAILURES,
    openapi_extra={
      "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(parser.model)}}}
    },
  )
  async def predict(request: Request) -> Response:
    """Returns the labels of highest score for each query."""
    model = _ready(engine)
    async with parser.body(request) as body:
      if is_quick(body):
        queries = parser.parse(body, model)
      else:
        queries = await asyncio.get_running_loop().run_in_executor(pool, parser.parse, body, model)
      del body
      try:
        waiting = batcher.submit(queries)
      except QueueFull as error:
        raise RequestError(503, "too many queries are waiting; send this request again later") from error
      answers = [await asyncio.wrap_future(answer) for answer in waiting]
    found = [
      {"uid": each.query.uid, "predictions": [label._asdict() for label in labels]}
      for each, labels in zip(queries, answers, strict=True)
    ]
    return Response(to_json({"answers": found}), media_type="application/json")

  app.include_router(router)

  @app.get("/v1/labels/{uid:path}", responses={404: {"model": schema.Failure, "description": "No such label."}})
  def label(uid: str) -> schema.Label:
    """Returns the label of a uid."""
    labels = _ready(engine).labels
    try:
      (found,) = labels.ids_of([uid]).tolist()
    except InputError as error:
      raise RequestError(404, "there is no such label", "uid") from error
    return schema.Label(label=uid, id=found, text=labels.texts([found])[0])

  describe = app.openapi

  def openapi() -> dict[str, Any]:
    described = describe()
    _, definitions = models_json_schema([(parser.model, "validation")], ref_template="#/components/schemas/{model}")
    described["components"]["schemas"] |= definitions["$defs"]
    return described

  app.openapi = openapi  # type: ignore[method-assign]
  return predict


def _reference(model: type) -> dict[str, str]:
  return {"$ref": f"#/components/schemas/{model.__name__}"}


def _add_operations(
  app: FastAPI, engine: Engine, batcher: Batcher[QueryRequest, list[Prediction]], limits: Limits, metrics: Metrics
) -> None:
  metrics.queue_queries.set_function(lambda: len(batcher))

  @app.get("/healthz", responses={503: {"model": schema.Health, "description": "The server is starting."}})
  async def health(response: Response) -> schema.Health:
    """Says whether the model is loaded and every program is compiled."""
    model = engine.model
    if model is None:
      response.status_code = 503
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
    )

  @app.get("/metrics", response_class=Response)
  def measurements() -> Response:
    """Returns counts and times, for Prometheus."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
  for path, (name, media_type) in _PAGE_FILES.items():
    app.add_api_route(path, _sender((_PAGE / name).read_bytes(), media_type), include_in_schema=False)


def _sender(content: bytes, media_type: str) -> Callable[[], Response]:
  return lambda: Response(content, media_type=media_type, headers=_PAGE_HEADERS)


def _add_errors(app: FastAPI) -> None:

  @app.exception_handler(RequestError)
  @app.exception_handler(InputError)
  @app.exception_handler(HTTPException)
  @app.exception_handler(Exception)
  async def on_error(request: Request, error: Exception) -> Response:
    return _failure(error)


def _failure(error: Exception) -> Response:
  """Returns the response to a request that failed."""
  if isinstance(error, HTTPException):
    response = _failure(RequestError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response
  if isinstance(error, InputError):
    error = RequestError(422, str(error))
  elif not isinstance(error, RequestError):
    error = RequestError(500, "the server failed on this request; see its log")
  make = _EarlyResponse if error.status == 413 else Response
  return make(error.body, error.status, error.headers, media_type="application/json")


class _EarlyResponse(Response):
  """A response that is sent before the request's body has arrived, and then reads the rest of the body.

  A client that sends its whole body before it reads would otherwise not see the response.
  """

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    self.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
    await send({"type": "http.response.body", "body": self.body, "more_body": True})
    if not any(name == b"expect" for name, _ in scope["headers"]):  # A client that waits for permission sends no body.
      try:
        async with asyncio.timeout(_LINGER_SECONDS):
          while (await receive()).get("more_body"):
            pass
      except TimeoutError:
        pass
    await send({"type": "http.response.body"})


class _CountRequests:
  """Middleware that counts and times requests by route; all unknown paths count as one route."""

  def __init__(self, app: _AsgiApp, metrics: Metrics):
    self._app, self._metrics = app, metrics

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    status, started = 500, time.perf_counter()

    async def sent(message: Message) -> None:
      nonlocal status
      status = message.get("status", status)
      await send(message)

    try:
      await self._app(scope, receive, sent)
    finally:
      route = getattr(scope.get("route"), "path", "other")
      self._metrics.requests.labels(route, status).inc()
      self._metrics.request_seconds.labels(route).observe(time.perf_counter() - started)
