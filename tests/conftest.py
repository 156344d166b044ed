"""Gives every test eight CPU devices, a compilation cache and no network; all set before jax is imported."""

import ipaddress
import os
from pathlib import Path
import socket

import pytest

_ROOT = Path(__file__).resolve().parent.parent

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
      ]
    ).strip(),
    # Programs are kept between runs and shared with the processes that tests start.
    "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    # Most of the tests' time is compilation; their programs are too small to gain by the last of it.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    # What tests load is on disk; asking a hub is an error.
    "HF_HUB_OFFLINE": "1",
    # The threads of tokenizers would outlive a fork and are not worth it for a few rows.
    "TOKENIZERS_PARALLELISM": "false",
    # torch's idle threads sleep rather than spin: they share two cores with XLA's.
    "OMP_WAIT_POLICY": "passive",
  }
)

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
_attempts: list[str] = []


class NetworkBlocked(OSError):
  """A test tried to leave this machine."""


def _check_local(host) -> None:
  """Notes the attempt and raises unless `host` is this machine."""
  host = host.decode() if isinstance(host, bytes) else host
  if host in (None, "", "localhost", socket.gethostname()):
    return
  try:
    address = ipaddress.ip_address(host)
    if address.is_loopback or address.is_unspecified:
      return
  except ValueError:
    pass  # A name that is not this machine's.
  _attempts.append(host)
  raise NetworkBlocked(f"tests have no network, but something asked for {host!r}")


def _guarded(connect):
  def guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
      _check_local(address[0])
    return connect(self, address)

  return guarded


def _guarded_getaddrinfo(host, *args, **kwargs):
  _check_local(host)
  return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = _guarded(_connect)
socket.socket.connect_ex = _guarded(_connect_ex)
socket.getaddrinfo = _guarded_getaddrinfo


@pytest.fixture(autouse=True)
def network_attempts():
  """Hosts that the test asked for; a test that leaves any fails, also when a library swallowed the error."""
  _attempts.clear()
  yield _attempts
  assert not _attempts, f"the test asked the network for {_attempts}"
