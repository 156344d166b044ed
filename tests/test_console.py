"""The command `vixml`: its commands are the entry points, it starts quickly, and shells complete it."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from tests.helpers.documents import ROOT
import vixml_jax
from vixml_jax.__main__ import MODULES

HEAVY = ("jax", "flax", "transformers", "tensorflow_datasets", "orbax", "optax", "tokenizers", "pyarrow")


def _run(*command, cwd=ROOT):
  return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)


def _vixml(*arguments):
  return _run(sys.executable, "-m", "vixml_jax", *arguments)


def test_commands_are_the_entry_points():
  files = (path for path in (ROOT / "vixml_jax").glob("[a-z]*.py"))
  assert sorted(MODULES.values()) == sorted(
    path.stem for path in files if '__name__ == "__main__"' in path.read_text("utf-8")
  )


def test_help_lists_every_command_with_one_line():
  result = _vixml("--help")
  assert (result.returncode, result.stderr) == (0, "")
  lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
  for name in (*MODULES, "completion"):
    assert lines[name].endswith("."), name


def test_version():
  assert _vixml("--version").stdout == f"vixml {vixml_jax.__version__}\n"


@pytest.mark.parametrize("name", ["train", "predict"])
def test_help_of_a_command_is_that_of_its_module(name):
  result, module = _vixml(name, "--help"), _run(sys.executable, "-m", f"vixml_jax.{MODULES[name]}", "--help")
  assert (result.returncode, result.stdout, result.stderr) == (0, module.stdout, "")


def test_help_shows_the_flags_of_the_command_with_their_defaults():
  shown = _vixml("predict", "--help").stdout
  assert (
    "--image_batch_size: Number of images that the tower encodes at a time.\n    (a positive integer; default: 64)"
    in shown
  )
  assert "--[no]distributed" in shown
  assert "--config" not in shown and "--verbosity" not in shown


def test_help_ends_quietly_when_its_reader_does():
  command = f"{sys.executable} -m vixml_jax predict --help | head -n 1"
  result = _run("bash", "-c", command)
  assert result.stdout.startswith("Predicts") and result.stderr == ""


# Completion imports all entry points, as `--help` and errors in flags do with one.
_IMPORTED = """
import sys
from vixml_jax import __main__, completion
completion.script("bash", __main__.MODULES)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_flags_of_all_commands_are_read_without_heavy_imports():
  result = _run(sys.executable, "-c", _IMPORTED)
  assert result.returncode == 0, result.stderr
  assert not {*result.stdout.split()} & {*HEAVY}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["trian"], "trian: unknown command; did you mean train?"),
    (["x"], "x: unknown command; see vixml --help"),
    (["predict", "--querys=q.jsonl"], "Did you mean: queries"),
    (["train"], "--config: must be given"),
    (["completion"], "give one of bash, zsh"),
    (["completion", "fish"], "give one of bash, zsh"),
  ],
)
def test_wrong_command_line_is_one_line(arguments, message):
  result = _vixml(*arguments)
  assert (result.returncode, result.stdout) == (1, "")
  assert result.stderr.startswith("error: ") and message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def bash_completion(tmp_path_factory):
  folder = tmp_path_factory.mktemp("completion")
  script = folder / "vixml.bash"
  script.write_text(_vixml("completion", "bash").stdout)
  (folder / "my queries.jsonl").touch()

  def complete(*words):
    """Returns what bash offers for the last word. Bash itself splits words at `=`."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _vixml; printf "%s\\n" "${{COMPREPLY[@]}}"'
    result = _run("bash", "-c", f"source {script}; {code}", cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()

  return complete


@pytest.mark.parametrize(
  ("words", "offered"),
  [
    (("vixml", "pre"), ["predict", "prepare"]),
    (("vixml", "predict", "--qu"), ["--queries="]),
    (("vixml", "predict", "--retrieval_a"), ["--retrieval_augmented"]),
    (("vixml", "add-labels", "--num_p"), ["--num_processes="]),
    (("vixml", "predict", "--queries", "=", "my"), ["my queries.jsonl"]),
    (("vixml", "predict", "--search", "=", "s"), ["scann"]),
    (("vixml", "train", "--config", "=", "qui"), ["quickstart"]),
    (("vixml", "completion", "b"), ["bash"]),
  ],
)
def test_bash_completes(words, offered, bash_completion):
  assert bash_completion(*words) == offered


def test_bash_offers_all_values_and_files_after_the_equals_sign(bash_completion):
  assert {"exact", "scann", "my queries.jsonl"} <= {*bash_completion("vixml", "predict", "--search", "=")}


class Zsh:
  """An interactive zsh in a terminal, which loads the completion as a user does.

  Its file of settings binds two keys: Control-G writes the command line to a file, and Tab completes, as always.
  """

  def __init__(self, folder, load):
    self.folder, self.line = folder, folder / "line"
    (folder / "work").mkdir()
    (folder / "work" / "my queries.jsonl").touch()
    (folder / ".zshrc").write_text(
      f"{load}\n"
      f"tell() {{ print -r -- $BUFFER > {self.line}.new; command mv {self.line}.new {self.line}; BUFFER=''; }}\n"
      "zle -N tell; bindkey '^G' tell\n"
    )
    self.terminal, end = pty.openpty()
    self.shell = subprocess.Popen(
      ["zsh", "-o", "NO_GLOBAL_RCS", "-i"],
      stdin=end,
      stdout=end,
      stderr=end,
      cwd=folder / "work",
      start_new_session=True,
      env={"PATH": os.environ["PATH"], "HOME": str(folder), "ZDOTDIR": str(folder), "TERM": "vt100", "COLUMNS": "300"},
    )
    os.close(end)

  def complete(self, typed):
    """Returns the command line after Tab."""
    self.line.unlink(missing_ok=True)
    os.write(self.terminal, f"{typed}\t\a".encode())
    self.read_until(lambda shown: self.line.exists())
    return self.line.read_text().removesuffix("\n")

  def offers(self, typed, last):
    """Returns the words that Tab lists, of which `last` is the last one."""
    os.write(self.terminal, f"{typed}\t".encode())
    listed = self.read_until(lambda shown: last in shown.partition("\n")[2])
    os.write(self.terminal, b"\a")  # zsh lists nothing if there is more to read.
    return {*re.split(r"\s{2,}", re.sub(r"\x1b\[\d*[A-Za-z]", "  ", listed))}

  def read_until(self, is_done):
    """Returns what the terminal has shown when `is_done` is true of it."""
    shown, until = "", time.monotonic() + 60
    while not is_done(shown):
      assert time.monotonic() < until, shown
      if select.select([self.terminal], [], [], 0.05)[0]:
        shown += os.read(self.terminal, 65536).replace(b"\0", b"").decode(errors="replace")
    return shown

  def close(self):
    """Ends it."""
    self.shell.kill()
    self.shell.wait()
    os.close(self.terminal)


@pytest.fixture(scope="module", params=["sourced", "from fpath"])
def zsh(request, tmp_path_factory):
  if shutil.which("zsh") is None:
    pytest.skip("zsh is not installed")
  folder = tmp_path_factory.mktemp("zsh")
  (folder / "functions").mkdir()
  (folder / "functions" / "_vixml").write_text(_vixml("completion", "zsh").stdout)
  load = f"autoload -Uz compinit; compinit -D -u; . {folder}/functions/_vixml"
  if request.param == "from fpath":
    load = f"fpath=({folder}/functions $fpath); autoload -Uz compinit; compinit -D -u"
  shell = Zsh(folder, load)
  yield shell
  shell.close()


@pytest.mark.parametrize(
  ("typed", "completed"),
  [
    ("vixml pred", "vixml predict "),
    ("vixml predict --qu", "vixml predict --queries="),
    ("vixml predict --k=5 --retrieval_a", "vixml predict --k=5 --retrieval_augmented "),
    ("vixml add-labels --num_p", "vixml add-labels --num_processes="),
    ("vixml predict --queries=my", r"vixml predict --queries=my\ queries.jsonl "),
    ("vixml predict --search=s", "vixml predict --search=scann "),
    ("vixml train --config=qui", "vixml train --config=quickstart "),
    ("vixml completion b", "vixml completion bash "),
    ("vixml predict --nonsense", "vixml predict --nonsense"),
  ],
)
def test_zsh_completes(typed, completed, zsh):
  assert zsh.complete(typed) == completed


def test_zsh_offers_all_values_and_files_after_the_equals_sign(zsh):
  file = r"my\ queries.jsonl"
  assert {"exact", "scann", file} <= zsh.offers("vixml predict --search=", last=file)


def test_zsh_script_knows_the_same_commands_flags_and_values():
  bash, zsh = (_vixml("completion", shell).stdout for shell in ("bash", "zsh"))
  entries = [line.strip() for line in bash.splitlines() if line.endswith(";;")]
  assert len(entries) > len(MODULES)
  assert entries == [line.strip() for line in zsh.splitlines() if line.endswith(";;")]


_TABLES = """
from tools import flag_tables
print(flag_tables.with_tables(flag_tables.PAGE.read_text("utf-8")), end="")
"""


def test_page_of_commands_has_every_flag_with_its_help():
  result = _run(sys.executable, "-c", _TABLES)
  assert result.returncode == 0, result.stderr
  page = (ROOT / "docs" / "commands.md").read_text("utf-8")
  assert result.stdout == page, "run: python -m tools.flag_tables"
