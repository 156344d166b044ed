"""A trained encoder in int8 on the CPU: an ONNX model, made once and kept in the workdir."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
import numpy as np

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.files import locked, new_file, read_json_object, write_json
from vixml_jax.inference.onnx_conversion import check_convertible, to_int8
from vixml_jax.inference.trained_encoder import TrainedEncoder, load_trained_encoder
from vixml_jax.input.packing import whole_items
from vixml_jax.onnx_models.quantization import weight_bits
from vixml_jax.onnx_models.session import OnnxEncoder
from vixml_jax.ragged import Ragged
from vixml_jax.run import configuration
from vixml_jax.run.workdir import CONFIG, ONNX

_log = logging.getLogger(__name__)

_FORMAT = 1
_MODEL, _INFO, _LOCK = "int8.onnx", "int8.json", "lock"


@dataclasses.dataclass(frozen=True)
class QuantizedEncoder(TrainedEncoder):
  """Embeds texts and images as `TrainedEncoder`, with the layers of the encoder in int8.

  Attributes:
    sha256: sha256 of the ONNX model.
    model: What runs it.
  """

  sha256: str
  model: OnnxEncoder = dataclasses.field(repr=False)

  def settings(self) -> dict[str, Any]:
    """Returns what determines an embedding besides its item; see `TrainedEncoder.settings`."""
    return super().settings() | {"int8_sha256": self.sha256}

  def pooled(
    self,
    texts: Sequence[str] | Ragged,
    vectors: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    whole_chunks: bool = False,
  ) -> np.ndarray:
    """Returns encoder outputs before normalization; see `TrainedEncoder.pooled`. Nothing is ever compiled."""
    items, features = self._items(texts, vectors)
    return self.model.pooled(whole_items(items, self.layout), None if features is None else features.values)

  def warm_up(self, items: int) -> Iterator[Callable[[], object]]:
    """Yields a function that embeds one item: ONNX Runtime allocates its memory at the first call."""
    yield functools.partial(self.embed, [""])


def load_quantized_encoder(workdir: Path, mesh: Mesh | None = None) -> QuantizedEncoder:
  """Restores the newest checkpoint of a workdir, with the encoder in int8.

  The ONNX model is made when a checkpoint is loaded for the first time, and stored in `onnx/` of the workdir.

  Args:
    workdir: As for `load_trained_encoder`.
    mesh: As for `load_trained_encoder`; devices of the CPU.

  Raises:
    InputError: As for `load_trained_encoder`; or the devices are not CPUs, the model cannot be an ONNX model, or onnx
      or onnxruntime is not installed.
  """
  config = configuration.read(workdir / CONFIG)
  check_convertible(workdir, config)
  encoder = load_trained_encoder(workdir, mesh)
  platform = sharding.platform_of(encoder.mesh)
  if platform != "cpu":
    raise InputError(
      f"encoder=int8: runs on CPUs, but the devices are {platform}s; set JAX_PLATFORMS=cpu, or leave out encoder=int8"
    )
  content, sha256 = _model(encoder)
  fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
  return QuantizedEncoder(**fields, sha256=sha256, model=OnnxEncoder(content))


def _model(encoder: TrainedEncoder) -> tuple[bytes, str]:
  """Returns the ONNX model of the checkpoint and its sha256, from the workdir if it is there."""
  folder = encoder.workdir / ONNX
  found = _stored(folder, encoder.checkpoint)
  if found is None:
    with locked(folder / _LOCK):
      found = _stored(folder, encoder.checkpoint) or _make(encoder, folder)
  return found


def _make(encoder: TrainedEncoder, folder: Path) -> tuple[bytes, str]:
  """Makes and stores the ONNX model. `int8.json` is written last, so that it never describes another file for long."""
  _log.info("making the int8 encoder of %s in %s", encoder.workdir, folder)
  content, cosine = to_int8(encoder)
  sha256 = hashlib.sha256(content).hexdigest()
  with new_file(folder / _MODEL) as work:
    work.write_bytes(content)
  info = {"format": _FORMAT, "checkpoint": encoder.checkpoint, "weight_bits": weight_bits(), "sha256": sha256}
  write_json(folder / _INFO, info | {"cosine": cosine})
  return content, sha256


def _stored(folder: Path, checkpoint: dict[str, Any]) -> tuple[bytes, str] | None:
  """Returns the stored ONNX model and its sha256; None if it is of another checkpoint or CPU, damaged, or absent."""
  again = "it is made again"
  if not (folder / _INFO).exists():
    return None
  try:
    info = read_json_object(folder / _INFO, absent=again, damaged=again)
    content = (folder / _MODEL).read_bytes()
  except InputError as error:
    _log.warning("%s", error)
    return None
  except OSError as error:
    _log.warning("%s; %s", error, again)
    return None
  is_ours = (info.get("format"), info.get("checkpoint")) == (_FORMAT, checkpoint)
  if not is_ours or info.get("weight_bits") not in range(weight_bits() + 1):
    return None
  sha256 = hashlib.sha256(content).hexdigest()
  if sha256 != info.get("sha256"):
    _log.warning("%s: is damaged; %s", folder / _MODEL, again)
    return None
  return content, sha256
