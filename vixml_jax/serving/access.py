"""Who may use a server: API keys, names of the server, and origins of web pages."""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import hmac
import ipaddress
import os
from pathlib import Path
import socket
from urllib.parse import urlsplit

from vixml_jax.errors import InputError

API_KEY_VARIABLE = "VIXML_API_KEY"
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True)
class Access:
  """Who may use a server.

  Attributes:
    key_digests: sha256 of each API key; without any, every request is accepted.
    hosts: Names that a request may give the server in its Host header, in lower case; None for any name.
    any_address: Whether a request may also name any IP address. A page that rebinds its own name to this machine sends
      that name, never an address.
    origins: Origins of other web pages that may call the API; "*" for all.
  """

  key_digests: tuple[bytes, ...] = ()
  hosts: frozenset[str] | None = frozenset(_LOCAL)
  any_address: bool = False
  origins: tuple[str, ...] = ()

  @classmethod
  def of(
    cls, host: str, allowed_hosts: Sequence[str] = (), origins: Sequence[str] = (), keys: Sequence[str] = ()
  ) -> "Access":
    """Returns who may use a server that listens on an address.

    Args:
      host: Address or name that the server listens on.
      allowed_hosts: Further names that requests may give it, without port; "*" for any.
      origins: Origins of other web pages, such as https://shop.example.
      keys: API keys.

    Raises:
      InputError: An origin or a name is wrong.
    """
    for origin in origins:
      parts = urlsplit(origin)
      if origin != "*" and (parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"):
        raise InputError(f"--cors_origins={origin}: must be an origin such as https://shop.example, or *")
    for name in allowed_hosts:
      if name != "*" and (not name or "/" in name or "*" in name):
        raise InputError(f"--allowed_hosts={name}: must be a name such as shop.example, without scheme, or *")
    everywhere = host in ("", "0.0.0.0", "::")  # nosec B104 - a comparison; by default the server is local.
    names = {*_LOCAL, host, *allowed_hosts, *([socket.gethostname()] if everywhere else [])}
    return cls(
      key_digests=tuple(_digest(key.encode()) for key in keys),
      hosts=None if "*" in allowed_hosts else frozenset(name.lower() for name in names),
      any_address=everywhere,
      origins=tuple(origins),
    )

  def knows_key(self, authorization: bytes) -> bool:
    """Returns whether an Authorization header has a valid key; the time that it takes does not depend on the key."""
    scheme, _, key = authorization.partition(b" ")
    digest = _digest(key.strip())
    matches = [hmac.compare_digest(digest, known) for known in self.key_digests]
    return any(matches) and scheme.lower() == b"bearer"

  @functools.lru_cache(maxsize=256)  # noqa: B019 (a server has one for as long as it lives)
  def knows_host(self, header: bytes) -> bool:
    """Returns whether a Host header names this server."""
    if self.hosts is None:
      return True
    try:
      name = urlsplit(f"//{header.decode('ascii')}").hostname or ""
    except ValueError:
      return False
    return name in self.hosts or (self.any_address and _is_address(name))


def read_keys(path: str | None) -> list[str]:
  """Returns the API keys of a file, one a line, or that of the environment variable VIXML_API_KEY, or none.

  Args:
    path: The file; None for the environment variable.

  Raises:
    InputError: The file cannot be read, or has no key.
  """
  if path is None:
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    return [key] if key else []
  try:
    keys = Path(path).read_text(encoding="utf-8").split()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"--api_key_file={path}: cannot be read ({error}); name a text file with one key a line"
    ) from error
  if not keys:
    raise InputError(f"--api_key_file={path}: has no key; write one key a line")
  return keys


def _digest(key: bytes) -> bytes:
  return hashlib.sha256(key).digest()


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True
