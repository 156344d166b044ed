"""The routes: the JSON API with its OpenAPI description, health, metrics and the page."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

import vixml_jax
from vixml_jax.errors import InputError
from vixml_jax.inference.predictor import Prediction
from vixml_jax.serving import schema
from vixml_jax.serving.batching import Batcher, QueueFull
from vixml_jax.serving.engine import Engine, Model, QueryRequest
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_parser import RequestParser

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
  "/": ("page.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
}
# Nothing may come from elsewhere, and nothing in a text of a data set may run.
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
    (408, "The body came too slowly."),
    (413, "The body is too large."),
    (422, "A field is wrong."),
    (503, "Starting, or too much to do; try again."),
  )
}
_LINGER_SECONDS = 5.0


def make_app(
  engine: Engine, batcher: Batcher[QueryRequest, list[Prediction]], limits: Limits, metrics: Metrics
) -> FastAPI:
  """The application around an engine, which may still have to start."""
  app = FastAPI(
    title="vixml_jax",
    version=vixml_jax.__version__,
    description="The labels of texts and images.",
    docs_url=None,
    redoc_url=None,
  )  # Their pages load scripts from elsewhere.
  _add_api(app, engine, batcher, limits)
  _add_operations(app, engine, batcher, limits, metrics)
  _add_page(app)
  _add_errors(app)
  app.add_middleware(_Counted, metrics=metrics)
  return app


def _ready(engine: Engine) -> Model:
  if engine.model is None:
    raise RequestError(503, "the model is being loaded; try again")
  return engine.model


def _add_api(app: FastAPI, engine: Engine, batcher: Batcher[QueryRequest, list[Prediction]], limits: Limits) -> None:
  intake = RequestParser(limits)
  pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="intake")  # No more images are decoded at a time.

  @app.post(
    "/v1/predict",
    response_model=schema.Answers,
    responses=_FAILURES,
    openapi_extra={
      "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(intake.model)}}}
    },
  )
  async def predict(request: Request) -> Response:
    """The labels of highest score for each query."""
    model = _ready(engine)
    async with intake.body(request) as body:
      asked = await asyncio.get_running_loop().run_in_executor(pool, intake.parse, body, model)
      del body
      try:
        waiting = batcher.submit(asked)
      except QueueFull as error:
        raise RequestError(503, "too many queries are waiting; send this request again later") from error
      answers = await asyncio.gather(*map(asyncio.wrap_future, waiting))
    found = [
      {"uid": each.query.uid, "predictions": [label._asdict() for label in labels]}
      for each, labels in zip(asked, answers, strict=True)
    ]
    return Response(to_json({"answers": found}), media_type="application/json")

  @app.get("/v1/labels/{uid:path}", responses={404: {"model": schema.Failure, "description": "No such label."}})
  def label(uid: str) -> schema.Label:
    """The label of a uid."""
    index = _ready(engine).index
    try:
      (found,) = index.ids_of([uid]).tolist()
    except InputError as error:
      raise RequestError(404, "there is no such label", "uid") from error
    return schema.Label(label=uid, id=found, text=index.texts([found])[0])

  describe = app.openapi

  def openapi() -> dict[str, Any]:
    described = describe()
    _, definitions = models_json_schema([(intake.model, "validation")], ref_template="#/components/schemas/{model}")
    described["components"]["schemas"] |= definitions["$defs"]
    return described

  app.openapi = openapi  # type: ignore[method-assign]


def _reference(model: type) -> dict[str, str]:
  return {"$ref": f"#/components/schemas/{model.__name__}"}


def _add_operations(
  app: FastAPI, engine: Engine, batcher: Batcher[QueryRequest, list[Prediction]], limits: Limits, metrics: Metrics
) -> None:
  metrics.queue_queries.set_function(lambda: len(batcher))

  @app.get("/healthz", responses={503: {"model": schema.Health, "description": "Not yet."}})
  async def health(response: Response) -> schema.Health:
    """Ready when the model is loaded and every program is compiled."""
    model = engine.model
    if model is None:
      response.status_code = 503
      return schema.Health(status="starting")
    encoder = model.predictor.encoder
    return schema.Health(
      status="ready",
      step=encoder.checkpoint["step"],
      labels=model.index.num_live,
      search=model.index.search_kind,
      retrieval_augmented=model.predictor.retrieval is not None,
      texts=list(encoder.config.dataset.text_fields),
      images=encoder.images,
      pictures=model.reads_pictures,
      max_k=min(limits.k, model.index.num_live),
    )

  @app.get("/metrics", response_class=Response)
  def measured() -> Response:
    """Counts and times, for Prometheus."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
  for path, (name, media_type) in _PAGE_FILES.items():
    app.add_api_route(path, _sender((_PAGE / name).read_bytes(), media_type), include_in_schema=False)


def _sender(content: bytes, media_type: str) -> Callable[[], Response]:
  return lambda: Response(content, media_type=media_type, headers=_PAGE_HEADERS)


def _add_errors(app: FastAPI) -> None:

  @app.exception_handler(RequestError)
  async def refused(request: Request, error: RequestError) -> Response:
    make = _Lingering if error.status == 413 else Response
    return make(error.body, error.status, error.headers, media_type="application/json")

  @app.exception_handler(InputError)
  async def refused_late(request: Request, error: InputError) -> Response:
    return await refused(request, RequestError(422, str(error)))

  @app.exception_handler(HTTPException)
  async def unknown(request: Request, error: HTTPException) -> Response:
    response = await refused(request, RequestError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response

  @app.exception_handler(Exception)
  async def failed(request: Request, error: Exception) -> Response:
    return await refused(request, RequestError(500, "the server failed on this request; its log says why"))


class _Lingering(Response):
  """Answers before the body has come, and then reads what is still sent: else the client might never see the answer."""

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    self.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
    await send({"type": "http.response.body", "body": self.body, "more_body": True})
    if not any(name == b"expect" for name, _ in scope["headers"]):  # Who asked first sends nothing.
      try:
        async with asyncio.timeout(_LINGER_SECONDS):
          while (await receive()).get("more_body"):
            pass
      except TimeoutError:
        pass
    await send({"type": "http.response.body"})


class _Counted:
  """Counts and times requests by route; unknown paths are one."""

  def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], metrics: Metrics):
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
