"""The command `vixml`: its commands are the entry points, it starts quickly, and shells complete it."""

import subprocess
import sys

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
