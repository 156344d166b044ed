"""Tests cannot reach the network, and a test that tries fails."""

import socket

import pytest


def test_network_is_blocked(network_attempts):
  with pytest.raises(OSError, match="no network"):
    socket.create_connection(("example.org", 80), timeout=1)
  with socket.socket() as unbound, pytest.raises(OSError, match="no network"):
    unbound.connect(("192.0.2.1", 80))
  assert network_attempts == ["example.org", "192.0.2.1"]
  network_attempts.clear()
