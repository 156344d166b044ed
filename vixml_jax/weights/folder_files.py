"""Checks by their names which files a model in the format of Hugging Face has, before any of them is read."""

from collections.abc import Collection
import json
from pathlib import Path
import shlex

from vixml_jax.errors import InputError

MODEL = "model"  # Name of the files with weights, without the endings.
ENDING = ".safetensors"
INDEX_ENDING = ".safetensors.index.json"


def check_names(model: str, names: Collection[str], *, weights: bool, tokenizer: bool) -> None:
  """Checks that a model has the files that this package reads.

  Args:
    model: Its folder, or its name on the hub with an optional `@revision`.
    names: Names of all its files.
    weights: Whether it must have safetensors.
    tokenizer: Whether it must have `tokenizer.json`.

  Raises:
    InputError: If a file is missing. Where transformers can make it from the other files, the message has the command.
  """
  if "config.json" not in names:
    raise InputError(f"{model}: has no config.json; give a model in the format of Hugging Face")
  if weights and not {MODEL + ENDING, MODEL + INDEX_ENDING} & set(names):
    others = sorted(name for name in names if name.endswith((".bin", ".h5", ".msgpack", ".ckpt", ".pt", ".pth")))
    if not others:
      raise InputError(
        f"{model}: has neither {MODEL + ENDING} nor {MODEL + INDEX_ENDING}; give a model with one of them"
      )
    raise InputError(
      f"{model}: has only pickled weights or other formats ({', '.join(others)}), which are not read; "
      f"{_conversion(model)}"
    )
  if tokenizer and "tokenizer.json" not in names:
    raise InputError(f"{model}: has no tokenizer.json, the file of a fast tokenizer; {_conversion(model)}")


def weight_files(folder: Path, stem: str = MODEL) -> list[Path]:
  """Returns the safetensors files of a folder: one file, or those that its index lists.

  Raises:
    InputError: If there are none, the index is damaged, or a file that it lists is missing.
  """
  single, index = folder / f"{stem}{ENDING}", folder / f"{stem}{INDEX_ENDING}"
  if single.is_file():
    return [single]
  if index.is_file():
    return _shards(index)
  if stem == MODEL and list(folder.glob("*.bin")):
    check_names(str(folder), {"config.json", *(path.name for path in folder.iterdir())}, weights=True, tokenizer=False)
  raise InputError(f"{folder}: has neither {single.name} nor {index.name}; give a folder with one of them")


def conversion_command(model: str, folder: str) -> str:
  """Returns a shell command that writes a model as safetensors, with a fast tokenizer, into a folder.

  It needs transformers, which this package installs, and torch, which it does not.

  Args:
    model: Its folder, or its name on the hub with an optional `@revision`.
    folder: The folder to write.
  """
  name, _, revision = (model, "", "") if Path(model).is_dir() else model.partition("@")
  given = json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
  to = json.dumps(folder)
  code = (
    "from transformers import AutoModel, AutoTokenizer; "
    f"AutoModel.from_pretrained({given}).save_pretrained({to}, safe_serialization=True); "
    f"AutoTokenizer.from_pretrained({given}).save_pretrained({to})"
  )
  return f"python -c {shlex.quote(code)}"


def _conversion(model: str) -> str:
  folder = f"{Path(model.partition('@')[0]).name}-safetensors"
  return (
    f"where torch is installed, run: {conversion_command(model, folder)} and then give this folder, for a text encoder "
    f"by --config.encoder.pretrained={folder}"
  )


def _shards(index: Path) -> list[Path]:
  try:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    outside = [name for name in names if Path(name).name != name]
  except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
    raise InputError(f"{index}: is not an index of safetensors files ({error!r:.200}); fetch it again") from error
  if outside:
    raise InputError(
      f"{index}: lists {' '.join(outside[0].split()):.200}, which is not a file of this folder; fetch the index again"
    )
  found = {path.name for path in index.parent.iterdir() if path.is_file()}
  missing = [name for name in names if name not in found]
  if missing or not names:
    shown = " ".join(", ".join(missing).split()) or "no files"
    raise InputError(f"{index}: lists {shown:.400}, which the folder does not have; fetch them again")
  return [index.parent / name for name in names]
