"""Gives every test eight CPU devices, a compilation cache and no network, and shares trained workdirs among tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import gc
import ipaddress
import os
from pathlib import Path
import socket
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
  from tests.helpers.trained_workdirs import Trained

_ROOT = Path(__file__).resolve().parent.parent

# The heap of a process that has run thousands of tests is large, and little of it is garbage; see `frozen_heap`.
gc.set_threshold(5_000, 10, 20)
# Files that take long start first, so that no process is left with one of them at the end.
_FIRST = (
  "tests/training/",
  "tests/ahead_of_time/",
  "tests/run/test_config_extremes.py",
  "tests/faults/",
  "tests/bad_input/",
  "tests/api/",
  "tests/exporting/test_export.py",
  "tests/run/test_configs.py",
  "tests/serving/test_requests.py",
  "tests/tables/test_training.py",
  "tests/test_cost_growth.py",
  "tests/test_documented_commands.py",
  "tests/test_joined_processes.py",
  "tests/test_parity_benchmark.py",
)

# Set before jax is imported.
os.environ.update(
  {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join(
      [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Eight devices share the cores: on a loaded machine one may wait for another longer than XLA's 40 s.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        # The older emitters of fusions compile a training step in a third of the time.
        "--xla_cpu_use_fusion_emitters=false",
      ]
    ).strip(),
    # Compiled programs are kept between runs, and shared with the processes that tests start.
    "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # Compilation takes most of the tests' time, and their programs are too small to gain from optimization.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    # Without the place in the source of every operation, a program is traced and lowered in less time.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    # Everything that tests load is on disk.
    "HF_HUB_OFFLINE": "1",
    # The threads of tokenizers do not survive a fork, and do not pay off for a few rows.
    "TOKENIZERS_PARALLELISM": "false",
    # Idle threads of torch sleep instead of spinning: they share two cores with those of XLA.
    "OMP_WAIT_POLICY": "passive",
  }
)

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
_attempts: list[str] = []


class NetworkBlocked(OSError):
  """A test asked for another machine."""


def _check_local(host: str | bytes | None) -> None:
  """Records the attempt and raises unless `host` is this machine."""
  host = host.decode() if isinstance(host, bytes) else host
  if host in (None, "", "localhost", socket.gethostname()):
    return
  try:
    address = ipaddress.ip_address(host)
    if address.is_loopback or address.is_unspecified:
      return
  except ValueError:
    pass  # The name of another machine.
  _attempts.append(host)
  raise NetworkBlocked(f"tests have no network, but something asked for {host!r}")


def _guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
  def guarded(self: socket.socket, address: Any) -> Any:
    if self.family in (socket.AF_INET, socket.AF_INET6):
      _check_local(address[0])
    return connect(self, address)

  return guarded


def _guarded_getaddrinfo(host: str | bytes | None, *args: Any, **kwargs: Any) -> Any:
  _check_local(host)
  return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = _guarded(_connect)
socket.socket.connect_ex = _guarded(_connect_ex)
socket.getaddrinfo = _guarded_getaddrinfo


@pytest.fixture(autouse=True)
def network_attempts() -> Iterator[list[str]]:
  """Hosts that the test asked for. A test that leaves any fails, also when a library swallowed the error."""
  _attempts.clear()
  yield _attempts
  assert not _attempts, f"the test asked the network for {_attempts}"


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> Iterator[None]:
  """Leaves what a file has imported and compiled out of later garbage collections, which took a second each."""
  yield
  gc.collect()
  gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the tests of long files first; the order is kept otherwise."""
  items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))


def _shared_workdir(name: str) -> Any:
  @pytest.fixture(scope="session", name=name)
  def fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    from tests.helpers.trained_workdirs import trained_once  # Imports jax and torch, which few test files need.

    yield from trained_once(tmp_path_factory, name)

  return fixture


# Workdirs that are trained when the first test asks for them; see tests/helpers/trained_workdirs.py.
texts_only = _shared_workdir("texts_only")
with_images = _shared_workdir("with_images")
adapters = _shared_workdir("adapters")
