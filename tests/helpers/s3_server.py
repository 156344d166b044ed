"""A local server that answers as S3 does."""

from collections.abc import Iterator
import contextlib
import subprocess
import sys
from typing import Any

import fsspec
import pytest

# moto's server prints lines of its own and then its port, and ends with its input.
_SERVER = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0)
server.start()
print("port", server._server.port, flush=True)
input()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[Any, dict[str, str]]]:
  """Yields the file system of a server with an empty bucket named `bucket`, and the environment of its clients.

  The test is skipped without s3fs or moto.
  """
  for package in ("s3fs", "moto"):
    pytest.importorskip(package, reason=f"needs {package}: pip install -c constraints.txt -e '.[slow]'")
  with subprocess.Popen(
    [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as server:
    assert server.stdin and server.stdout
    try:
      url = f"http://127.0.0.1:{next(line.split()[1] for line in server.stdout if line.startswith('port '))}"
      environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
      }
      files = fsspec.filesystem("s3", endpoint_url=url, key="none", secret="none", use_listings_cache=False)
      files.mkdir("bucket")
      yield files, environment
    finally:
      server.stdin.close()
      server.wait()
