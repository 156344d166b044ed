"""Reads Markdown pages: their prose, inline code, code blocks and shell commands."""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
import re
import shlex
import subprocess
from typing import NamedTuple

from vixml_jax.__main__ import MODULES

ROOT = Path(__file__).resolve().parent.parent.parent
_KEYWORDS = {"do", "then", "else", "if", "while", "time"}


@dataclasses.dataclass(frozen=True)
class Block:
  """A code block.

  Attributes:
    language: Word after the opening fence; "" for none.
    line: Number of the first line of code.
    code: Its text.
  """

  language: str
  line: int
  code: str


class Command(NamedTuple):
  """A simple command of a shell: its words, and the number of the line that it ends on."""

  line: int
  words: list[str]


class Span(NamedTuple):
  """Inline code and the number of its line."""

  line: int
  text: str


@dataclasses.dataclass(frozen=True)
class Document:
  """A Markdown page.

  Attributes:
    path: File.
    blocks: Code blocks.
    prose: Text outside of code blocks, with an empty line for each line of code.
  """

  path: Path
  blocks: tuple[Block, ...]
  prose: str

  @classmethod
  def read(cls, path: Path) -> "Document":
    """Returns the page in a file."""
    blocks, prose, code = list[Block](), list[str](), None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
      fence = re.fullmatch(r"\s*```\s*([\w-]*)\s*", line)
      prose.append("" if fence or code is not None else line)
      if not fence:
        if code is not None:
          code.append(line)
      elif code is None:
        language, start, code = fence[1], number + 1, list[str]()
      else:
        blocks.append(Block(language, start, "\n".join(code) + "\n"))
        code = None
    if code is not None:
      raise ValueError(f"{path}:{start}: the code block does not end")
    return cls(path, tuple(blocks), "\n".join(prose))

  def spans(self) -> Iterator[Span]:
    """Yields inline code; a span may continue on the next line."""
    for match in re.finditer(r"`((?:[^`\n]|\n(?!\n))+)`", self.prose):
      yield Span(self.prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split()))

  def headings(self) -> set[str]:
    """Returns the anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

  def commands(self) -> Iterator[Command]:
    """Yields the simple commands of all shell blocks.

    Raises:
      ValueError: A line is not valid shell syntax.
    """
    for block in self.blocks:
      if block.language in ("bash", "console"):
        for line, text in shell_lines(block):
          try:
            yield from _simple_commands(line, text)
          except ValueError as error:
            raise ValueError(f"{self.at(line)}: {error}: {text}") from error

  def at(self, line: int) -> str:
    """Returns how findings name a line."""
    path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
    return f"{path}:{line}"


def tracked_pages() -> list[Path]:
  """Returns the Markdown files that git tracks or would track, except the page of the embedded data set."""
  command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.md"]
  listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if listed.returncode:  # No git checkout.
    names = ["README.md", "CONTRIBUTING.md", "launch/README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
  else:
    names = listed.stdout.split("\0")
  paths = [ROOT / name for name in names if name and not name.startswith("vixml_jax/datasets/")]
  return sorted(path for path in paths if path.is_file())


def shell_lines(block: Block) -> Iterator[tuple[int, str]]:
  """Yields the logical lines of a shell block; in `console` blocks, those after the prompt `$ `."""
  joined = ""
  for number, line in enumerate(block.code.splitlines(), block.line):
    if block.language == "console" and not joined:
      if not line.startswith("$ "):
        continue
      line = line[2:]
    joined += line.removesuffix("\\")
    if not line.endswith("\\"):
      yield number, joined
      joined = ""


def _simple_commands(line: int, text: str) -> Iterator[Command]:
  lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
  lexer.whitespace_split = True
  words: list[str] = []
  for word in [*lexer, ";"]:
    if not re.fullmatch(r"[;|&]+", word):
      words.append(word)
      continue
    while words and (words[0] in _KEYWORDS or re.match(r"[A-Z_]+=", words[0])):
      words = words[1:]
    if words and words[0] not in ("for", "done", "fi"):
      yield Command(line, _without_redirections(words))
    words = []


def _without_redirections(words: list[str]) -> list[str]:
  kept: list[str] = []
  skip = False
  for word in words:
    redirects = re.fullmatch(r"[<>]+", word) is not None
    if not redirects and not skip:
      kept.append(word)
    skip = redirects
  return kept


def needs_a_trained_model(code: str) -> bool:
  """Whether a Python block loads a run that commands of the pages train."""
  return "vixml_jax.load(" in code or '"runs/' in code


def program_of(words: list[str]) -> tuple[str, list[str]]:
  """Returns what a command runs and the words that follow.

  `python -m X` and the short names of `vixml` give the module, and a script its path.
  """
  head = re.sub(r"^(\.venv|build/\w+)/bin/", "", words[0])
  if head == "vixml" and len(words) > 1 and not words[1].startswith("-"):
    return f"vixml_jax.{MODULES[words[1]]}" if words[1] in MODULES else " ".join(words[:2]), words[2:]
  if re.fullmatch(r"python3?(\.\d+)?", head):
    if len(words) > 2 and words[1] == "-m":
      return words[2], words[3:]
    if len(words) > 1 and not words[1].startswith("-"):
      return words[1], words[2:]
    return "python", words[1:]
  return head, words[1:]
