"""Answers queries over HTTP with a trained workdir, and serves a page to try it.

  python -m vixml_jax.serve --workdir=runs/NAME --port=8080 [--host=127.0.0.1]
      [--search=exact|scann] [--ranking=plain|retrieval_augmented|blend] [--rankings=plain,blend] [--reload_index=10]
      [--index_dtype=int8|bit] [--dims=96] [--explain=texts|rows|none]

No training data are needed. The serve extra must be installed. POST /v1/predict takes queries and returns their
labels, and POST /v1/embeddings answers clients of OpenAI's API; /openapi.json describes the API; /readyz says whether
the server is ready; /metrics is for Prometheus; / is the page. SIGTERM stops the server after it has answered the
requests in flight. SIGHUP makes it look for a new snapshot of the label index.
"""

import gc
import io
from pathlib import Path
import sys
from typing import TYPE_CHECKING

from absl import flags

from vixml_jax import cli, inference_flags
from vixml_jax.errors import InputError, install_command
from vixml_jax.inference.rankings import AUGMENTED, RANKINGS

if TYPE_CHECKING:
  from collections.abc import Callable

  from vixml_jax.inference.shared_programs import SharedPrograms
  from vixml_jax.serving.rankings import Rankings
  from vixml_jax.serving.request_record import RequestRecord

_MODEL = inference_flags.define_model_flags(image_batch_size=8)
_SEARCH = inference_flags.define_search_flags("the ranking of highest P@1 in the run's evaluation")
_RANKINGS = flags.DEFINE_list(
  "rankings", list(RANKINGS), "Rankings that requests may name, of those that the index has; others use no memory."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all addresses of this machine.")
_PORT = flags.DEFINE_integer("port", 8080, "Port to listen on; 0 for a free one.", 0, 65_535)
_RELOAD = flags.DEFINE_float(
  "reload_index", 0, "Seconds between checks for a new snapshot of the label index; 0 to check on SIGHUP only.", 0
)
_MAX_BATCH = flags.DEFINE_integer("max_batch", 64, "Maximum number of queries that share a batch.", 1)
_MAX_BATCH_TOKENS = flags.DEFINE_integer(
  "max_batch_tokens", 2_048, "Maximum number of tokens of the queries that share a batch, images included.", 1
)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 1_024, "Maximum number of waiting queries; more get status 503.", 1)
_MAX_BODY = flags.DEFINE_float("max_body_mb", 16, "Maximum size of a request in megabytes.", 0.001)
_MAX_K = flags.DEFINE_integer("max_k", 100, "Maximum number of labels for each query.", 1)
_MAX_QUERIES = flags.DEFINE_integer("max_queries", 64, "Maximum number of queries in a request.", 1)
_MAX_TEXT = flags.DEFINE_integer("max_text_chars", 10_000, "Maximum number of characters of a text.", 1)
_MAX_IMAGES = flags.DEFINE_integer("max_images", 8, "Maximum number of images of a query.", 1)
_MAX_NAMES = flags.DEFINE_integer("max_filter_names", 1_000, "Maximum number of names in a filter's list.", 1)
_MAX_PIXELS = flags.DEFINE_integer(
  "max_pixels",
  64 * 2**20,
  "Maximum number of pixels of all images of a request, by their headers, and of one client's requests at a time.",
  1,
)
_MAX_CONNECTIONS = flags.DEFINE_integer("max_connections", 1_024, "Maximum number of open connections.", 1)
_MAX_CLIENT_CONNECTIONS = flags.DEFINE_integer(
  "max_client_connections", 256, "Maximum number of open connections of one client.", 1
)
_IDLE_SECONDS = flags.DEFINE_float(
  "idle_seconds", 60, "Seconds after which a connection without a request is closed.", 0.001
)
_ANSWER_SECONDS = flags.DEFINE_float(
  "answer_seconds", 60, "Seconds from the arrival of a request to its answer; later ones get status 503.", 0.001
)
_PROXIES = flags.DEFINE_list(
  "proxies",
  [],
  "Addresses or networks of proxies before this server: the header X-Forwarded-For of their requests names the client.",
)
_KEY_FILE = flags.DEFINE_string(
  "api_key_file",
  None,
  "File with the API keys that requests must have one of, one a line; by default the variable VIXML_API_KEY, if set.",
)
_ALLOWED_HOSTS = flags.DEFINE_list(
  "allowed_hosts",
  [],
  "Names of this server in the Host header of requests, besides localhost, --host and, if that is 0.0.0.0, the name of "
  "this machine and all IP addresses; * for any name.",
)
_ORIGINS = flags.DEFINE_list(
  "cors_origins", [], "Origins of other web pages that may call the API, such as https://shop.example; * for all."
)
_EXPLAIN = flags.DEFINE_enum(
  "explain",
  "texts",
  ["texts", "rows", "none"],
  "What answers with explain show of training queries: texts and rows, rows without texts, or none: no explanations.",
)
_LOG_FORMAT = flags.DEFINE_enum(
  "log_format", "text", ["text", "json"], "json: log lines are JSON objects, and every request has one."
)


class _NoTerminal(io.TextIOWrapper):
  """A stream that is not a terminal to libraries: otherwise every batch of requests would draw a progress bar."""

  def isatty(self) -> bool:
    return False


def main() -> None:
  """Serves until a signal stops the server."""
  import jax

  if jax.process_count() > 1:
    raise InputError("--distributed: serve runs in one process; start one on each machine")
  workdir = cli.required(_MODEL.workdir)
  if "://" not in workdir and not Path(workdir).is_dir():  # Before the server listens.
    raise InputError(f"{workdir}: no such folder; set --workdir to the folder of a run")
  sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
  try:
    from vixml_jax.serving import access, request_log, tracing
    from vixml_jax.serving.explanations import Detail
    from vixml_jax.serving.limits import Limits
    from vixml_jax.serving.server import Server
  except ImportError as error:
    raise InputError(f"serving needs the package {error.name}; run: {install_command('serve')}") from error
  _check_rankings()
  if _MAX_QUERIES.value > _MAX_QUEUE.value:
    raise InputError(f"--max_queries={_MAX_QUERIES.value}: must be at most --max_queue={_MAX_QUEUE.value}")
  cli.mesh(_MODEL.mesh)  # Errors in flags are reported before the server listens.
  limits = Limits(
    body_bytes=int(_MAX_BODY.value * 10**6),
    queries=_MAX_QUERIES.value,
    k=_MAX_K.value,
    text_chars=_MAX_TEXT.value,
    images=_MAX_IMAGES.value,
    names=_MAX_NAMES.value,
    pixels=_MAX_PIXELS.value,
    batch=_MAX_BATCH.value,
    batch_tokens=_MAX_BATCH_TOKENS.value,
    queue=_MAX_QUEUE.value,
    answer_seconds=_ANSWER_SECONDS.value,
    connections=_MAX_CONNECTIONS.value,
    client_connections=_MAX_CLIENT_CONNECTIONS.value,
    idle_seconds=_IDLE_SECONDS.value,
  )

  programs: SharedPrograms | None = None

  def load() -> "Rankings":
    nonlocal programs
    programs = _MODEL.use_compile_cache()
    rankings = _load_rankings(_MODEL.folder())
    # A collection that visits the million objects of the libraries would stop every request for a second.
    gc.freeze()
    return rankings

  def store_programs() -> None:
    if programs is not None:
      programs.store()

  observers: list[Callable[[RequestRecord], None]] = []
  if _LOG_FORMAT.value == "json":
    request_log.use_json_lines()
    observers.append(request_log.log_request)
  provider = tracing.provider_from_environment()
  if provider is not None:
    observers.append(tracing.span_recorder(provider))
  keys = access.read_keys(_KEY_FILE.value)
  allowed = access.Access.of(_HOST.value, _ALLOWED_HOSTS.value, _ORIGINS.value, keys)
  try:
    server = Server(
      load,
      _HOST.value,
      _PORT.value,
      limits,
      _RELOAD.value or None,
      access=allowed,
      proxies=_PROXIES.value,
      observers=observers,
      detail=Detail(_EXPLAIN.value),
      compiled=store_programs,
    )
    server.run()
  finally:
    if provider is not None:
      provider.shutdown()


def _check_rankings() -> None:
  unknown = [name for name in _RANKINGS.value if name not in RANKINGS]
  if unknown or not _RANKINGS.value:
    given = ",".join(_RANKINGS.value)
    raise InputError(f"--rankings={given}: must be some of {', '.join(RANKINGS)}, separated by commas")
  if (asked := _asked_ranking()) and asked not in _RANKINGS.value:
    raise InputError(f"--ranking={asked}: must be one of --rankings={','.join(_RANKINGS.value)}")


def _asked_ranking() -> str | None:
  """Returns the default ranking that the flags name; None if they leave it to the run's evaluation."""
  return AUGMENTED if _SEARCH.retrieval_augmented.value else _SEARCH.ranking.value


def _load_rankings(workdir: Path) -> "Rankings":
  from vixml_jax.serving.rankings import Rankings, best_ranking

  best = None if _asked_ranking() else best_ranking(workdir, _RANKINGS.value, _SEARCH.dims.value)
  return Rankings.of(
    _MODEL.load(_SEARCH, best.name if best else None),
    _RANKINGS.value,
    best.reason if best else "the server was started with it",
    tail=_SEARCH.tail.value,
    min_probability=_SEARCH.min_probability.value,
    retrieval_lambda=_SEARCH.retrieval_lambda.value,
    retrieval_temperature=_SEARCH.retrieval_temperature.value,
  )


if __name__ == "__main__":
  cli.run(main, saved="the label index is as it was", stopped=0)
