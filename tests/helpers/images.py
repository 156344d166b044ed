"""What the Dockerfiles of launch/ have in common."""

import re
import shlex


def assert_hashes_are_required(dockerfile: str) -> None:
  """Every package that an image installs with pip has a known hash; our own code is installed without dependencies."""
  commands = re.findall(r"pip install ([^\n&\\]*)", dockerfile)
  assert len(commands) == 3
  for words in map(shlex.split, commands):
    own = words[-1] == "." and {"--no-deps", "--no-build-isolation"} <= set(words)
    assert own or ("--require-hashes" in words and words[-1].startswith("requirements/")), words
