"""Requests have ids, lines in the log and spans; none of them holds a text of a query."""

import io
import json
import logging
import sys

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
import pytest

from tests.helpers.http_server import call, predict, running, wait_for
from vixml_jax.errors import InputError
from vixml_jax.serving import request_log, tracing


@pytest.fixture(scope="module")
def spans():
  return InMemorySpanExporter()


@pytest.fixture(scope="module")
def observed(predictor, spans):
  provider = TracerProvider()
  provider.add_span_processor(SimpleSpanProcessor(spans))
  observers = (request_log.log_request, tracing.span_recorder(provider))
  with running(lambda: predictor, observers=observers) as server:
    yield server
  provider.shutdown()


@pytest.fixture
def lines(caplog):
  caplog.set_level(logging.INFO, "vixml_jax")
  return lambda: [record.fields for record in caplog.records if record.name == "vixml_jax.serving.request_log"]


def test_every_request_has_a_line_with_its_id_status_and_times(observed, lines):
  body = json.dumps({"queries": [{"title": "sunsecret"}] * 3})
  reply = call(observed, "/v1/predict?q=sunsecret", body, X_Request_Id="order-17")
  assert reply.status == 200 and reply.headers["X-Request-Id"] == "order-17"
  wait_for(lambda: lines())
  (line,) = lines()
  assert line | {"request_id": "order-17", "method": "POST", "path": "/v1/predict", "status": 200} == line
  assert line["queries"] == 3 and line["client"] == "127.0.0.1"
  assert 0 < line["encode_ms"] < line["ms"] and 0 < line["search_ms"] < line["ms"] and line["queue_ms"] >= 0
  assert "sunsecret" not in json.dumps(line)


def test_ids_are_made_up_if_there_is_none_or_a_bad_one(observed, lines):
  ids = {call(observed, "/nothing", X_Request_Id=given).headers["X-Request-Id"] for given in ("", 'a"b', "x" * 129)}
  assert len(ids) == 3 and all(len(each) == 32 for each in ids)
  wait_for(lambda: len(lines()) == 3)
  assert {line["status"] for line in lines()} == {404} and {line["request_id"] for line in lines()} == ids
  assert "queue_ms" not in lines()[0]


def test_log_lines_are_json_objects():
  stream, logger = io.StringIO(), logging.Logger("vixml_jax.x")
  handler = logging.StreamHandler(stream)
  handler.setFormatter(request_log.JsonFormatter())
  logger.addHandler(handler)
  logger.info("two\nlines %s", "é", extra={"fields": {"status": 200}})
  try:
    1 / 0  # noqa: B018
  except ZeroDivisionError:
    logger.exception("failed")
  first, second = map(json.loads, stream.getvalue().splitlines())
  assert first["message"] == "two\nlines é" and first["status"] == 200 and first["level"] == "info"
  assert first["time"].endswith("+00:00") and "ZeroDivisionError" in second["exception"]


def test_spans_of_a_request_join_the_trace_of_its_client(observed, spans):
  spans.clear()
  trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
  body = json.dumps({"queries": [{"title": "sun"}]})
  assert call(observed, "/v1/predict", body, Traceparent=f"00-{trace}-{parent}-01").status == 200
  wait_for(lambda: len(spans.get_finished_spans()) == 3)
  by_name = {span.name: span for span in spans.get_finished_spans()}
  request, encode, search = (by_name[name] for name in ("request", "encode", "search"))
  assert f"{request.context.trace_id:032x}" == trace and f"{request.parent.span_id:016x}" == parent
  assert encode.parent.span_id == search.parent.span_id == request.context.span_id
  assert request.start_time <= encode.start_time < encode.end_time == search.start_time < search.end_time
  assert search.end_time <= request.end_time
  assert request.attributes["url.path"] == "/v1/predict" and request.attributes["http.response.status_code"] == 200
  assert "sun" not in str(dict(request.attributes))


def test_without_an_endpoint_nothing_is_traced_and_without_the_packages_an_endpoint_is_refused(monkeypatch):
  monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
  assert tracing.provider_from_environment() is None
  monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
  provider = tracing.provider_from_environment()
  assert provider.resource.attributes["service.name"] == "vixml_jax"
  provider.shutdown()
  monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
  with pytest.raises(InputError, match=r"run: pip install 'vixml-jax\[otel\]'"):
    tracing.provider_from_environment()


def test_without_observers_a_request_has_its_id(server):
  assert len(predict(server, {"title": "sun"}).headers["X-Request-Id"]) == 32
