"""The files of the page, and the headers that keep it from loading anything from elsewhere."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Response

_PAGE = Path(__file__).parent / "page"
_FILES = {
  "/": ("page.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
}
# The page loads nothing from other hosts, and no text of a data set can run a script.
_HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  "Cross-Origin-Opener-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",
  "X-Frame-Options": "DENY",
  "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
  """Adds the page at `/`, with its style and its script."""
  for path, (name, media_type) in _FILES.items():
    app.add_api_route(path, _sender((_PAGE / name).read_bytes(), media_type), include_in_schema=False)


def _sender(content: bytes, media_type: str) -> Callable[[], Response]:
  return lambda: Response(content, media_type=media_type, headers=_HEADERS)
