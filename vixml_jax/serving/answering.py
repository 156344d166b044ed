"""From the body of a request to what its queries get: within a deadline, and only while the client waits for it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import os
import time
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vixml_jax.serving.batching import Batcher, QueueFull
from vixml_jax.serving.budgets import Budget, Share
from vixml_jax.serving.engine import Engine, Outcome, QueryRequest, ServedModel
from vixml_jax.serving.failures import failure
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.request_error import RequestError
from vixml_jax.serving.request_images import pixels_to_decode, prepare_images
from vixml_jax.serving.request_parser import RequestParser, is_quick
from vixml_jax.serving.request_record import RequestRecord

_LARGE_BYTES = 2**16  # uvicorn keeps as much for a client that reads slowly, and then waits.

_Parsed = TypeVar("_Parsed")


def ready(engine: Engine) -> ServedModel:
  """Returns the model.

  Raises:
    RequestError: 503 if it is being loaded.
  """
  if engine.model is None:
    raise RequestError(503, "the model is being loaded; try again")
  return engine.model


class Answering:
  """Reads requests, puts their queries into the queue, and waits for what they get."""

  def __init__(self, engine: Engine, batcher: Batcher[QueryRequest, Outcome], limits: Limits):
    """Takes what answers queries, and the limits of requests."""
    self.engine, self.parser = engine, RequestParser(limits)
    self._batcher, self._limits = batcher, limits
    self._parsers, self._decoders = (ThreadPoolExecutor(os.cpu_count(), name) for name in ("parser", "decoder"))
    self._pixels = Budget(4 * limits.pixels, limits.pixels)
    self._queue = Budget(limits.queue, limits.client_queue)

  async def __call__(
    self,
    request: Request,
    parse: Callable[[bytes, ServedModel], _Parsed],
    queries_of: Callable[[_Parsed], Sequence[QueryRequest]],
  ) -> tuple[_Parsed, list[Outcome]]:
    """Returns the parsed body of a request, and what each of its queries gets.

    Raises:
      RequestError: The request is wrong, or must wait, or the client has left.
    """
    model, client = ready(self.engine), Share.of(request.scope).client
    body = await self.parser.body(request)
    async with _while_it_waits(request, self._limits.answer_seconds):
      if is_quick(body):
        parsed = parse(body, model)
      else:
        parsed = await asyncio.get_running_loop().run_in_executor(self._parsers, parse, body, model)
      del body
      queries = queries_of(parsed)
      pixels = pixels_to_decode(queries, self._limits.pixels)
      if not pixels:
        return parsed, await self._outcomes(queries, request.scope, client)
      async with self._pixels.wait_for(client, pixels) as started:
        assert model.predictor.image_encoder is not None  # Otherwise there are no encoded images.
        queries = await prepare_images(queries, model.predictor.image_encoder.prepare, self._decoders, started)
        return parsed, await self._outcomes(queries, request.scope, client)

  async def _outcomes(self, queries: Sequence[QueryRequest], scope: Scope, client: str) -> list[Outcome]:
    """Puts queries into the queue, and returns what they get. Those that wait are dropped if it is cancelled."""
    record = RequestRecord.of(scope)
    record.queries = len(queries)
    if not self._queue.take(client, len(queries)):
      raise _overloaded()
    try:
      waiting = self._batcher.submit(queries)
      record.submitted = time.perf_counter()
      try:
        outcomes = [await asyncio.wrap_future(answer) for answer in waiting]
      finally:
        for answer in waiting:
          answer.cancel()  # Without effect on those that are computed.
    except QueueFull as error:
      raise _overloaded() from error
    finally:
      self._queue.give(client, len(queries))
    record.answered_by([outcome.times for outcome in outcomes])
    return outcomes


def _overloaded() -> RequestError:
  return RequestError(503, "too many queries are waiting; send this request again later")


@contextlib.asynccontextmanager
async def _while_it_waits(request: Request, seconds: float) -> AsyncIterator[None]:
  """Cancels the block after some seconds, or when the client leaves.

  Raises:
    RequestError: 503 or 499; nobody receives the latter.
  """
  leaving = asyncio.ensure_future(request.receive())  # After the body, only the end of the connection is received.
  try:
    async with asyncio.timeout(seconds) as deadline:

      def stop(_: object) -> None:
        if not leaving.cancelled() and not deadline.expired() and working:
          deadline.reschedule(0)

      working = True
      leaving.add_done_callback(stop)
      try:
        yield
      finally:
        working = False
  except TimeoutError as error:
    if leaving.done():
      raise RequestError(499, "the client has left") from error
    message = f"the answer takes more than {seconds:g} s; send fewer queries or images, or send it again later"
    raise RequestError(503, message) from error
  finally:
    leaving.cancel()


class AnswerResponse(Response):
  """A response whose bytes count for the share of its request until the client has taken most of them."""

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends it, or an error if there is no room for it."""
    if not Share.of(scope).resize(len(self.body)):
      error = RequestError(503, "too many large responses at the same time; send this request again later")
      await failure(error, scope["path"])(scope, receive, send)
    elif len(self.body) <= _LARGE_BYTES:
      await super().__call__(scope, receive, send)
    else:
      await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
      await send({"type": "http.response.body", "body": self.body, "more_body": True})
      await send({"type": "http.response.body"})  # Waits until less than that is unsent.
