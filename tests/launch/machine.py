"""A machine on which the programs that launchers call are replaced, and what the tests of launchers share."""

import os
from pathlib import Path
import shlex
import subprocess

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

WHERE = ["--project=p", "--zone=us-a1-z"]
POD = [*WHERE, "--name=pod", "--bucket=gs://b"]
CONFIG = "--config=configs/lf_amazon_1.3m.py:encoder=bert,images=3"
FIELDS = """--config.dataset.text_fields=('title', "it's $HOME")"""
TRAINING = ["--", CONFIG, FIELDS]
# Replaces every program that a launcher calls: records its arguments and prints the next line of its file of answers
# (";" is a new line, "!" a failure with a status and words). The last line of the file is repeated.
FAKE = r"""#!/usr/bin/env bash
program=$(basename "$0")
# In one write: both ends of a pipe log their calls at the same time.
printf -v call '\037%s' "$program" "$@"
printf '%s\n' "${call:1}" >> "$FAKE/calls"
case "$program $*" in
  *" ssh "*) answers=$FAKE/ssh ;;
  *"queued-resources describe"*) answers=$FAKE/describe ;;
  *"storage cat"*) answers=$FAKE/cat ;;
  *"auth list"*) answers=$FAKE/auth ;;
  *"projects describe"*) answers=$FAKE/projects ;;
  *"buckets describe"*) answers=$FAKE/bucket ;;
  *"accelerator-types list"*) answers=$FAKE/types ;;
  *"quotas info"*) answers=$FAKE/quota ;;
  *"storage ls"*) answers=$FAKE/ls ;;
  *) answers=$FAKE/$program ;;
esac
# Reads its input, as a real program would.
[[ $program != gcloud || $* != *" cp - "* ]] || cat > /dev/null
[[ -s $answers ]] || exit 0
answer=$(head -n 1 "$answers")
[[ $(wc -l < "$answers") == 1 ]] || sed -i 1d "$answers"
if [[ $answer == '!'* ]]; then
  read -r status words <<< "${answer#!}"
  [[ -z $words ]] || echo "$words" >&2
  exit "$status"
fi
printf '%s\n' "${answer//;/$'\n'}"
"""
READER = r"""#!/usr/bin/env bash
printf "%s\n" "$@" > "$FAKE/reader"
read -r stored
[[ -z $stored && $* != *--config=* ]] || cat "$FAKE/config"
"""


class Machine:
  """A folder of replaced programs with their answers and the calls that they received."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.bin = folder / "bin"
    self.bin.mkdir()
    self.env = {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "HOME": str(folder),
      "FAKE": str(folder),
      "HOSTNAME": "host",
      "TMPDIR": str(folder),
      "VIXML_PYTHON": str(self.bin / "reader"),
    }
    # Reads the config of the flags, or that of a run, which it is given.
    (self.bin / "reader").write_text(READER)
    (self.bin / "reader").chmod(0o755)

  def answer_all_checks(self) -> None:
    """Lets every check before a launch find what it looks for."""
    self.answer("config", "dataset=lf", "embedded=false", "features=siglip", "pretrained=Qwen/Qwen2.5-3B")
    self.answer("auth", "me@example.com")
    self.answer("projects", "123")
    self.answer("bucket", "US-A1\tTrue")
    self.answer("types", "v5litepod-16")
    self.answer("quota", ",8;us-a1-z,32;us-b1-z,")
    self.answer("ls", "gs://b/data/lf/")

  def replace(self, *programs: str) -> None:
    for program in programs:
      (self.bin / program).write_text(FAKE)
      (self.bin / program).chmod(0o755)

  def answer(self, what: str, *lines: str) -> None:
    (self.folder / what).write_text("".join(f"{line}\n" for line in lines))

  def calls(self) -> list[list[str]]:
    path = self.folder / "calls"
    return [line.split("\037") for line in path.read_text().splitlines()] if path.exists() else []

  def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ["bash", LAUNCH / script, *arguments], env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def commands_of(result: subprocess.CompletedProcess) -> list[list[str]]:
  """Returns the commands of a dry run, as a shell parses them."""
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


def option(command: list[str], name: str) -> str:
  (value,) = (word.partition("=")[2] for word in command if word.startswith(f"--{name}="))
  return value
