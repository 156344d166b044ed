"""Finds what Markdown pages name that does not exist: keys, flags, commands, files, headings.

Each check returns its findings as lines `FILE:LINE: message`, so a test can compare them with an empty list.
"""

from collections.abc import Callable
from pathlib import Path
import re
import shlex

from tests.helpers import repository
from tests.helpers.documents import ROOT, Document, Span, program_of

LANGUAGES = {"python", "bash", "console", "json", "text", "bibtex", "toml", "yaml"}
"""Languages that a code block may be marked with."""

SECTIONS = "dataset|features|fusion|prompt|encoder|prototype|loss|train|mining|mesh|eval|checkpoint"
_KEY = re.compile(rf"(?<![\w./-])(?:config\.)?((?:{SECTIONS})(?:\.[A-Za-z]\w*)+)")
_CONFIG_KEY = re.compile(r"(?<![\w./])config\.([a-z]\w*(?:\.[A-Za-z]\w*)*)")
_PYTHON_KEY = re.compile(rf"\bconfig\.((?:{SECTIONS})(?:\.[A-Za-z]\w*)+)")
_SUFFIXES = {".csv", ".gz", ".html", ".json", ".jsonl", ".log", ".npy", ".npz", ".parquet", ".py", ".svg", ".txt"}
_SUFFIXES |= {".cfg", ".md", ".sbatch", ".sh", ".toml", ".yml", ".css", ".js"}
_SOURCE_SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".toml", ".cfg", ".yml"}
# Attributes of a ConfigDict, which code writes like keys.
_METHODS = {"update", "items", "keys", "get", "copy_and_resolve_references", "to_dict", "lock", "unlocked"}


def wrong_keys(document: Document) -> list[str]:
  """Finds config keys in inline code and code blocks that do not exist."""
  found = []
  for block in document.blocks:
    pattern = _PYTHON_KEY if block.language == "python" else _KEY
    for number, line in enumerate(block.code.splitlines(), block.line):
      found += [f"{document.at(number)}: no config key {key}" for key in _missing_keys(line, pattern)]
  for span in document.spans():
    found += [f"{document.at(span.line)}: no config key {key}" for key in _missing_keys(span.text, _KEY, _CONFIG_KEY)]
  return found


def _missing_keys(text: str, *patterns: re.Pattern[str]) -> list[str]:
  keys = [match[1] for pattern in patterns for match in pattern.finditer(text)]
  keys = [key for key in keys if f".{key.rpartition('.')[2]}" not in _SUFFIXES and key != "json" and key != "py"]
  keys = [re.sub(rf"\.({'|'.join(_METHODS)})$", "", key) for key in keys]
  return sorted({key for key in keys if key not in repository.config_keys()} - _METHODS)


def wrong_flags(document: Document) -> list[str]:
  """Finds flags that their command does not have, and configs and variants that do not exist."""
  found = []
  for command in document.commands():
    found += [f"{document.at(command.line)}: {problem}" for problem in _problems_of_flags(command.words)]
  for line, text in document.spans():
    words = text.split() if "'" in text or '"' in text else shlex.split(text)
    if words and (words[0] in repository.PROGRAMS or words[0].startswith("launch/")):
      problems = _problems_of_flags(words)
    else:
      problems = _unknown(words, repository.all_flags() | {"config"}, "any command", repository.config_keys())
    found += [f"{document.at(line)}: {problem}" for problem in problems]
  return found


def _problems_of_flags(words: list[str]) -> list[str]:
  program, rest = program_of(words)
  flags = repository.flags_of_program(program)
  if flags is None:
    return _problems_of_make(rest) if program == "make" else []
  problems = []
  if program.startswith("launch/") and "--" in rest:
    place = rest.index("--")
    command = next((word.partition("=")[2] for word in rest[:place] if word.startswith("--command=")), "train")
    problems = _problems_of_flags(["vixml", command, *rest[place + 1 :]])
    rest = rest[:place]
  keys = repository.config_keys()
  for word in rest:
    if word.startswith("--config=") and "config" in flags:
      argument = word.partition("=")[2].replace("$encoder", "qwen2.5-3b")
      if "X.py" in argument or "..." in argument:
        continue
      try:
        keys = frozenset(repository.keys_of(repository.load_config(argument)))
      except ValueError as error:
        problems.append(str(error))
  return problems + _unknown(rest, flags, program, keys)


def _unknown(words: list[str], flags: frozenset[str], owner: str, keys: frozenset[str]) -> list[str]:
  problems = []
  for word in words:
    name = re.match(r"--(\[no\])?([A-Za-z][\w.-]*)", word)
    if name is None:
      continue
    if name[2].startswith("config.") and "config" in flags:
      if name[2].removeprefix("config.") not in keys:
        problems.append(f"no config key {name[2]}")
    elif name[2] not in flags and name[2].replace("-", "_") not in flags:
      problems.append(f"--{name[2]} is not a flag of {owner}")
  return problems


def _problems_of_make(words: list[str]) -> list[str]:
  targets, variables = repository.make_words()
  problems = []
  for word in words:
    if "=" in word:
      if word.partition("=")[0] not in variables:
        problems.append(f"the Makefile has no variable {word.partition('=')[0]}")
    elif re.fullmatch(r"[a-z][\w-]*", word) and word not in targets:
      problems.append(f"the Makefile has no target {word}")
  return problems


def wrong_programs(document: Document) -> list[str]:
  """Finds commands whose program is unknown, and modules that `python -m` cannot run."""
  found = []
  known = repository.PROGRAMS | repository.MODULES | set(repository.entry_points())
  for command in document.commands():
    program, _ = program_of(command.words)
    is_script = "/" in program and (ROOT / program).is_file()
    if program not in known and not is_script and not program.startswith("vixml_jax."):  # Those are checked below.
      found.append(f"{document.at(command.line)}: unknown program {program}")
  text = document.path.read_text("utf-8")
  for match in re.finditer(r"python -m (vixml_jax[\w.]*)", text):
    module = match[1].rstrip(".")
    if module not in repository.entry_points():
      found.append(f"{document.at(text.count(chr(10), 0, match.start()) + 1)}: {module} is not an entry point")
  return found


def wrong_files(document: Document) -> list[str]:
  """Finds files, folders, links and headings that do not exist.

  Names of files that commands write must occur in the code, or in a command of the page that makes them. Names with a
  placeholder in capitals, a template or a pattern are not checked.
  """
  commands = [word for command in document.commands() for word in command.words]
  words = [(line, text) for line, text in document.spans() if " " not in text]
  found = [
    f"{document.at(line)}: no such file: {text}" for line, text in words if not _exists(text, document, commands)
  ]
  for command in document.commands():
    for word in command.words:
      name = word.rpartition("=")[2].partition(":")[0]
      if _in_repository(name) and not _is_placeholder(name) and not (ROOT / name).exists():
        found.append(f"{document.at(command.line)}: no such file: {name}")
  for match in re.finditer(r"\]\(([^)\s]+)\)", document.prose):
    target, _, anchor = match[1].partition("#")
    if re.match(r"[a-z]+:", target):
      continue
    path = document.path.parent / target if target else document.path
    line = document.at(document.prose.count("\n", 0, match.start()) + 1)
    if not path.exists():
      found.append(f"{line}: no such file: {target}")
    elif anchor and anchor not in Document.read(path).headings():
      found.append(f"{line}: no such heading: {match[1]}")
  return found


def _in_repository(path: str) -> bool:
  """Whether a path starts in a folder of the repository that git tracks."""
  head, slash, _ = path.removeprefix("./").partition("/")
  return bool(slash) and head in {".ci", ".github", "benchmarks", "configs", "docs", "launch", "tests", "tools"} | {
    "vixml_jax"
  }


def _is_placeholder(path: str) -> bool:
  return re.search(r"[*{}<>$\[\]]|\.\.\.|(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])(?!\.md)|/X\.py|-N\b", path) is not None


def _exists(text: str, document: Document, commands: list[str]) -> bool:
  suffix = Path(text).suffix
  if not re.fullmatch(r"[\w./{},*-]+", text) or text.startswith(("/", "-", "..")):
    return True
  if suffix not in _SUFFIXES and not _in_repository(text) and not text.endswith("/"):
    return True
  if any((folder / text).exists() for folder in (ROOT, document.path.parent, repository.PACKAGE)):
    return True
  if _is_placeholder(text) or re.fullmatch(r"\.\w+", text):
    return True
  if _in_repository(text) or suffix in _SOURCE_SUFFIXES:
    return False
  name = re.escape(text.rstrip("/").rpartition("/")[2])
  pattern = rf"[\"'/]{name}[\"'/]" if text.endswith("/") else rf"(?<![\w.]){name}(?!\w)"
  return re.search(pattern, repository.sources()) is not None or any(
    re.search(pattern, f"/{word}/") for word in commands
  )


def wrong_names(document: Document) -> list[str]:
  """Finds dotted names of the package, such as `vixml_jax.ragged.Ragged`, that do not exist."""
  found = []
  texts = list(document.spans())
  texts += [Span(block.line, block.code) for block in document.blocks if block.language == "python"]
  for line, text in texts:
    for match in re.finditer(r"(?<![\w/.])vixml_jax((?:\.\w+)+)", text):
      if not repository.is_name(match[1][1:]):
        found.append(f"{document.at(line)}: no such name: vixml_jax{match[1]}")
  return found


def long_lines(document: Document, width: int = 120) -> list[str]:
  """Finds lines over `width` columns outside of tables, links and code."""
  found = []
  for number, line in enumerate(document.prose.splitlines(), 1):
    if len(line) > width and not line.lstrip().startswith("|") and not re.search(r"https?://\S{60,}", line):
      found.append(f"{document.at(number)}: {len(line)} columns; at most {width}")
  return found


def other_spellings(document: Document) -> list[str]:
  """Finds commands that are not spelled as `python -m vixml_jax.NAME`, and citations of documents that readers lack."""
  found = []
  for number, line in enumerate(document.path.read_text("utf-8").splitlines(), 1):
    if "bin/python -m vixml_jax" in line or re.search(r"python3? (\./)?vixml_jax/", line):
      found.append(f"{document.at(number)}: spell commands as python -m vixml_jax.NAME")
    if re.search(r"\b(METHOD|DESIGN|REVIEW|STYLE)(\.md|\b \")", line):
      found.append(f"{document.at(number)}: cite the section or equation of a paper")
  return found


def unmarked_blocks(document: Document) -> list[str]:
  """Finds code blocks without a language, or with an unknown one."""
  return [
    f"{document.at(block.line)}: mark the code block with one of {', '.join(sorted(LANGUAGES))}"
    for block in document.blocks
    if block.language not in LANGUAGES
  ]


def wrong_python(document: Document) -> list[str]:
  """Finds Python blocks that do not compile."""
  found = []
  for block in document.blocks:
    if block.language == "python" and not block.code.lstrip().startswith(">>>"):
      try:
        compile(block.code, str(document.path), "exec")
      except SyntaxError as error:
        found.append(f"{document.at(block.line + (error.lineno or 1) - 1)}: {error.msg}")
  return found


CHECKS: dict[str, Callable[[Document], list[str]]] = {
  "keys": wrong_keys,
  "flags": wrong_flags,
  "programs": wrong_programs,
  "files": wrong_files,
  "names": wrong_names,
  "columns": long_lines,
  "languages": unmarked_blocks,
  "spellings": other_spellings,
  "python": wrong_python,
}
