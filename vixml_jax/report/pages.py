"""Renders the HTML templates beside this module as pages that need nothing else, with every text in them escaped."""

import functools
from pathlib import Path
import re
from typing import Any

import jinja2

from vixml_jax.files import new_file

# No place in HTML: control characters, halves of surrogate pairs (which UTF-8 has no bytes for), two non-characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write_page(path: Path, template: str, **values: Any) -> None:
  """Writes a page, whole or not at all.

  Args:
    path: of the HTML file.
    template: a file of `templates/`.
    values: what the template shows; texts are escaped, `markupsafe.Markup` is not.
  """
  text = _templates().get_template(template).render(**values)
  with new_file(path) as partial:
    partial.write_text(text, encoding="utf-8")


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
  """Texts as HTML can hold them; what is markup already, and numbers, as they are."""
  return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
