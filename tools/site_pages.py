"""A hook of mkdocs: makes launch/README.md, which is not in docs/, a page of the documentation site.

Links are correct in the repository, where they are relative to the file. For the site they are rewritten.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

SOURCE, PAGE = "launch/README.md", "launch.md"


def on_files(files: Files, config: Any) -> Files:
  """Adds the page to the files of the site."""
  source = Path(config.config_file_path).parent / SOURCE
  files.append(File.generated(config, PAGE, content=source.read_text("utf-8").replace("](../docs/", "](")))
  return files


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Rewrites the links to the page."""
  return markdown.replace(f"](../{SOURCE}", f"]({PAGE}")
