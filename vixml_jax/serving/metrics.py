"""Counts and times of a server, for Prometheus."""

from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class Metrics:
  """The metrics of one server, in a registry of their own."""

  def __init__(self) -> None:
    self.registry = CollectorRegistry()
    ProcessCollector(registry=self.registry)

    def make(kind: type[_Metric], name: str, text: str, *labels: str, **options: Any) -> _Metric:
      return kind(f"vixml_{name}", text, labels, registry=self.registry, **options)

    self.requests = make(Counter, "requests", "Requests by route and status.", "route", "status")
    self.request_seconds = make(
      Histogram,
      "request_seconds",
      "Time from a request's headers to the end of its response.",
      "route",
      buckets=_SECONDS,
    )
    self.encode_seconds = make(
      Histogram, "encode_seconds", "Time to encode a batch, images included.", buckets=_SECONDS
    )
    self.search_seconds = make(
      Histogram, "search_seconds", "Time to search the labels of a batch and to look up their texts.", buckets=_SECONDS
    )
    self.batch_queries = make(Histogram, "batch_queries", "Queries of a batch.", buckets=_SIZES)
    self.queue_queries = make(Gauge, "queue_queries", "Queries that wait for the devices.")
    self.connections = make(Gauge, "connections", "Open connections.")
    self.ended_connections = make(Counter, "ended_connections", "Connections that the server ended.", "reason")
    self.labels = make(Gauge, "labels", "Labels that can be found.")
    self.reloads = make(Counter, "index_reloads", "New snapshots of the label index.", "outcome")
