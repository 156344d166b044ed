"""Runs a server in a thread, sends it requests and reads its metrics."""

import base64
import contextlib
import http.client
import io
import json
import re
import threading
import time
from urllib.parse import urlsplit

from PIL import Image
import pytest

from vixml_jax.inference.rankings import RANKINGS
from vixml_jax.serving import failures
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.rankings import Rankings
from vixml_jax.serving.server import Server

LIMITS = Limits(body_bytes=200_000, body_values=2_000, queries=5, k=20, text_chars=200, images=3, names=6, batch=16)


@contextlib.contextmanager
def running(load, limits=LIMITS, ready=True, rankings=RANKINGS, **options):
  """Runs a server of the predictor that `load` returns in a thread; at the end it waits for requests in flight."""
  server = Server(lambda: Rankings.of(load(), rankings), limits=limits, **options)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    if ready:
      wait_for(lambda: call(server, "/readyz").status == 200, seconds=600)  # On a loaded machine.
    yield server
  finally:
    server.stop()
    thread.join()


@contextlib.contextmanager
def quick_to_stop():
  """Shortens the time in which a server reads on after status 413, since it waits for that when it is stopped."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(failures, "_LINGER_SECONDS", 1.0)
    yield


def wait_for(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


class Reply:
  """Status, headers and body of a response."""

  def __init__(self, response):
    self.status, self.headers, self.body = response.status, response.headers, response.read()

  @property
  def json(self):
    return json.loads(self.body)


def connect(server):
  return http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)


def call(server, path, body=None, method=None, **headers):
  """Sends one request on its own connection; a body is declared as JSON, and `_` in the name of a header is a dash."""
  connection = connect(server)
  headers = {name.replace("_", "-"): value for name, value in headers.items()}
  if body is not None:
    headers = {"Content-Type": "application/json"} | headers
  try:
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    return Reply(connection.getresponse())
  finally:
    connection.close()


def predict(server, *queries, **others):
  return call(server, "/v1/predict", json.dumps({"queries": queries, **others}))


def labels_of(reply):
  assert reply.status == 200, reply.body
  return [
    [(found["label"], found["id"], found["text"]) for found in answer["predictions"]]
    for answer in reply.json["answers"]
  ]


def expected(predictor, queries, k):
  return [[tuple(found[:3]) for found in labels] for labels in predictor.predict(queries, k)]


def metric(server, name):
  """Returns the sum of a metric's samples."""
  lines = call(server, "/metrics").body.decode().splitlines()
  return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(re.escape(name) + r"[ {]", line))


def in_base64(query):
  """Returns a query with its images in base64."""
  images = [base64.b64encode(image).decode() for image in query.get("images", [])]
  return {key: value for key, value in query.items() if key != "images"} | ({"images": images} if images else {})


def png(width, height, mode="RGB"):
  buffer = io.BytesIO()
  Image.new(mode, (width, height)).save(buffer, "PNG")
  return buffer.getvalue()
