"""Renders the HTML templates of this package as self-contained pages: texts are escaped, and scripts are ours only."""

import base64
import functools
import hashlib
from importlib import resources
from pathlib import Path
import re
from typing import Any

import jinja2
from markupsafe import Markup

from vixml_jax.files import new_file

# Not allowed in HTML: control characters, surrogates (which UTF-8 cannot encode) and two non-characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write_page(path: Path, template: str, **values: Any) -> None:
  """Writes a page as a whole or not at all.

  Args:
    path: Path of the HTML file.
    template: Name of a file in `templates/`.
    **values: Variables of the template. Texts are escaped; `markupsafe.Markup` is not.
  """
  text = _templates().get_template(template).render(scripts=_scripts(), script_hashes=_script_hashes(), **values)
  with new_file(path) as partial:
    partial.write_text(text, encoding="utf-8")


@functools.cache
def _scripts() -> list[Markup]:
  """Returns the library that draws charts, and what calls it. Both are part of this package."""
  folder = resources.files("vixml_jax.report") / "static"
  # nosec B704 below: these files hold no data of users.
  names = ("echarts.common.min.js", "charts.js")
  return [Markup((folder / name).read_text("utf-8")) for name in names]  # nosec B704


def _script_hashes() -> list[str]:
  """Returns the sources that the page's policy permits: the hash of each script, so that no other can run."""
  digests = [hashlib.sha256(script.encode()).digest() for script in _scripts()]
  return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]


@functools.cache
def _templates() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("vixml_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_printable,
  )
  environment.filters.update(points=lambda value: f"{value:.2f}", signed=lambda value: f"{value:+.2f}")
  return environment


def _printable(value: Any) -> Any:
  """Returns a text with forbidden characters replaced, and any other value (markup, numbers) unchanged."""
  return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
