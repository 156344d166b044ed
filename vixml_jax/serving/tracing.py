"""Spans of requests for OpenTelemetry, if its packages are installed and an endpoint is set."""

from collections.abc import Callable
import logging
import os
import time
from typing import TYPE_CHECKING

from vixml_jax.errors import InputError, install_command
from vixml_jax.serving.request_record import RequestRecord

if TYPE_CHECKING:
  from opentelemetry.sdk.trace import TracerProvider

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"

_log = logging.getLogger(__name__)


def provider_from_environment() -> "TracerProvider | None":
  """Returns a provider that sends spans to the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT; None if that is not set.

  Raises:
    InputError: The variable is set, and the packages of OpenTelemetry are not installed.
  """
  endpoint = os.environ.get(ENDPOINT_VARIABLE)
  if not endpoint:
    return None
  try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
  except ImportError as error:
    raise InputError(
      f"{ENDPOINT_VARIABLE} is set, but the package {error.name} is missing; run: {install_command('otel')}, or unset "
      "the variable"
    ) from error
  name = os.environ.get("OTEL_SERVICE_NAME", "vixml_jax")
  provider = TracerProvider(resource=Resource.create({"service.name": name}))
  provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
  _log.info("spans are sent to %s", endpoint)
  return provider


def span_recorder(provider: "TracerProvider") -> Callable[[RequestRecord], None]:
  """Returns a function that makes the spans of an answered request: request, encode and search.

  They are made afterwards from the times of the record, so that a request costs nothing while it is answered.

  Args:
    provider: Where the spans go.
  """
  from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
  from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

  tracer, propagator = provider.get_tracer("vixml_jax.serving"), TraceContextTextMapPropagator()
  # Spans need the time of the clock, and records have that of a counter that never steps.
  offset = time.time_ns() - time.perf_counter_ns()

  def at(seconds: float) -> int:
    return offset + round(seconds * 1e9)

  def record_spans(record: RequestRecord) -> None:
    parent = propagator.extract({"traceparent": record.traceparent}) if record.traceparent else None
    attributes: dict[str, str | int] = {
      "http.request.method": record.method,
      "url.path": record.path,
      "http.response.status_code": record.status,
      "vixml.request_id": record.id,
      "vixml.queries": record.queries,
    }
    span = tracer.start_span("request", parent, SpanKind.SERVER, attributes, start_time=at(record.started))
    inside = set_span_in_context(span, parent)
    for batch in record.batches:
      for name, start, end in (("encode", batch.started, batch.encoded), ("search", batch.encoded, batch.searched)):
        tracer.start_span(name, inside, start_time=at(start)).end(at(end))
    if record.status >= 500:
      span.set_status(Status(StatusCode.ERROR))
    span.end(at(record.ended))

  return record_spans
