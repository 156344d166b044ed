"""Runs the application until SIGTERM: loads the model, watches the label index, and finishes requests in flight."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import logging
import math
import resource
import signal
import socket
import threading

import uvicorn

from vixml_jax.errors import InputError
from vixml_jax.serving.access import Access
from vixml_jax.serving.app import make_app
from vixml_jax.serving.batching import Batcher
from vixml_jax.serving.connections import Connections, protocol_class
from vixml_jax.serving.engine import Engine, Outcome, QueryRequest
from vixml_jax.serving.explanations import Detail
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.metrics import Metrics
from vixml_jax.serving.rankings import Rankings
from vixml_jax.serving.request_record import RequestRecord

_STOP_SECONDS = 5  # Less than the ten seconds in which every command ends (`stopping`).
_OWN_FILES = 256  # What the process has open besides connections; with search over many files, a few dozen.

_log = logging.getLogger(__name__)


class Server:
  """One model on one address. `run` returns after SIGTERM, SIGINT or `stop`.

  Attributes:
    url: URL that the server listens on.
  """

  def __init__(
    self,
    load: Callable[[], Rankings],
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
    reload_seconds: float | None = None,
    *,
    access: Access | None = None,
    proxies: Sequence[str] = (),
    observers: Sequence[Callable[[RequestRecord], None]] = (),
    detail: Detail = Detail.TEXTS,
    compiled: Callable[[], None] = lambda: None,
  ):
    """Starts to listen.

    Args:
      load: Function that loads a model with the rankings to offer; called after the server listens, so that /healthz
        can say that it is starting.
      host: Address or name of this machine.
      port: Port; 0 for a free one.
      limits: Limits of requests; None for the defaults.
      reload_seconds: Seconds between checks for a new snapshot of the label index; None to check only on `reload`.
      access: Who may use the server; None for any client that names it by `host` or as localhost.
      proxies: Addresses and networks of proxies, whose header X-Forwarded-For names the client.
      observers: Functions that get the record of each request after its response was sent.
      detail: What explanations say of training queries.
      compiled: Called when all programs of a model or of a new snapshot are compiled, while queries are answered.

    Raises:
      InputError: The address cannot be used.
    """
    limits, metrics, access = limits or Limits(), Metrics(), access or Access.of(host)
    if access.any_address and not access.key_digests:
      _log.warning("every machine that reaches this one may send requests: there is no API key (--api_key_file)")
    _allow_files(limits.connections + _OWN_FILES)
    self._engine = Engine(load, limits, metrics, detail)
    self._batcher: Batcher[QueryRequest, Outcome] = Batcher(
      self._engine.answer,
      lambda request: request.size,
      max_batch=limits.batch,
      max_size=limits.batch_tokens,
      max_queue=limits.queue,
    )
    app = make_app(self._engine, self._batcher, limits, metrics, access, observers)
    # Requests are counted in /metrics, and observers may log them; uvicorn's own lines have no times and no ids.
    self._http = uvicorn.Server(
      uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",  # Bytes that are not HTTP are counted instead of logged.
        server_header=False,
        http=protocol_class(Connections(limits, metrics, proxies)),
        ws="none",
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        timeout_keep_alive=math.ceil(limits.idle_seconds) + 1,  # Our own protocol closes idle connections.
        timeout_graceful_shutdown=_STOP_SECONDS,
      )
    )
    self._reload_seconds, self._compiled = reload_seconds, compiled
    self._wake, self._stopping = threading.Event(), False
    self._failure: Exception | None = None
    self._socket = _listen(host, port)
    self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"

  def run(self) -> None:
    """Serves, and returns when every request that has arrived is answered.

    Raises:
      InputError: `load` raised it.
    """
    work = threading.Thread(target=self._work, name="index", daemon=True)
    work.start()
    _log.info("listening on %s", self.url)
    with _signals(self.reload):
      self._http.run(sockets=[self._socket])
    self.stop()
    work.join()
    self._batcher.close()
    if self._failure:
      raise self._failure
    _log.info("stopped")

  def stop(self) -> None:
    """Makes `run` return; any thread may call this."""
    self._stopping = self._http.should_exit = True
    self._wake.set()

  def reload(self) -> None:
    """Makes the server check for a new snapshot of the label index; any thread or signal handler may call this."""
    self._wake.set()

  def _work(self) -> None:
    try:
      self._engine.start()
      self._compiled()
      while not self._stopping:
        self._wake.wait(self._reload_seconds)
        self._wake.clear()
        if not self._stopping and self._engine.reload_index():
          self._compiled()
    except Exception as error:
      self._failure = error
      self.stop()


@contextlib.contextmanager
def _signals(reload: Callable[[], None]) -> Iterator[None]:
  """Reloads on SIGHUP, and ignores the SIGTERM that uvicorn raises again after it has stopped."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  former = {
    signal.SIGHUP: signal.signal(signal.SIGHUP, lambda *_: reload()),
    signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: None),
  }
  try:
    yield
  finally:
    for number, handler in former.items():
      signal.signal(number, handler)


def _allow_files(number: int) -> None:
  """Raises the limit of open files of the process, as far as that is allowed; connections count as such."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = number if hard == resource.RLIM_INFINITY else min(number, hard)
  if soft != resource.RLIM_INFINITY and soft < most:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  if most < number:
    _log.warning("at most %d files may be open: lower --max_connections, or raise the limit (ulimit -Hn)", most)


def _listen(host: str, port: int) -> socket.socket:
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=1024)
  except (OSError, OverflowError) as error:
    reason = getattr(error, "strerror", None) or error
    raise InputError(
      f"--host={host} --port={port}: cannot be listened on ({reason}); use another address or port"
    ) from error
