"""Files of weights, npz and safetensors: valid ones, and mutations of their headers, offsets, indexes and configs."""

import dataclasses
import functools
import io
import json
import struct
import warnings
import zipfile

from hypothesis import strategies as st
import jax
import ml_dtypes
import numpy as np

from tests.bad_input import values
from tests.bad_input.campaign import Expected, refused
from tests.bad_input.mutations import mutations_of
from vixml_jax.models.vision import define_vision
from vixml_jax.weights import engine, tables

ARGUMENTS = dict(image_size=16, patch_size=8, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
_CONFIG = {
  "model_type": "siglip_vision_model",
  "image_size": 16,
  "patch_size": 8,
  "num_hidden_layers": 2,
  "hidden_size": 8,
  "num_attention_heads": 2,
  "intermediate_size": 12,
  "layer_norm_eps": 1e-6,
}


def random_tower(seed):
  """Returns random parameters of a tower, which are the contents of every case with this seed."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), define_vision(ARGUMENTS)[1])


TOWER = random_tower(0)
NPZ = {f"params/img/{name}": tensor for name, tensor in engine.invert(tables.BIG_VISION_STACKED, TOWER).items()}
UNSTACKED = {f"img/{name}": tensor for name, tensor in engine.invert(tables.BIG_VISION_UNSTACKED, TOWER).items()}
SAFETENSORS = engine.invert(tables.SIGLIP, TOWER)


@dataclasses.dataclass
class Weights:
  """A tower as files: `tower.npz`, or a folder in the format of Hugging Face."""

  files: dict[str, bytes]

  @property
  def path(self):
    return "tower.npz" if "tower.npz" in self.files else ""


MUTATIONS = {}
mutation = mutations_of(MUTATIONS)


WORKS = Expected(TOWER)


# npz


def npy_header(descr, shape, order=False, version=1, raw=None):
  """Returns the header of an array, whose size may be anything."""
  text = raw if raw is not None else f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
  text = text.encode("latin-1")
  length = struct.pack("<H", len(text)) if version == 1 else struct.pack("<I", len(text))
  return b"\x93NUMPY" + bytes((version, 0)) + length + text


def npy(array):
  sink = io.BytesIO()
  np.lib.format.write_array(sink, array, allow_pickle=False)
  return sink.getvalue()


def npz(members, compression=zipfile.ZIP_STORED):
  """Returns a zip file of members, which may have the same name."""
  sink = io.BytesIO()
  with zipfile.ZipFile(sink, "w", compression) as archive, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of names that occur twice.
    for name, content in members:
      archive.writestr(zipfile.ZipInfo(name), content, compression)
  return sink.getvalue()


def npz_case(members, compression=zipfile.ZIP_STORED):
  return Weights({"tower.npz": npz(members.items() if isinstance(members, dict) else members, compression)})


def _members(tensors=NPZ):
  return {f"{name}.npy": npy(tensor) for name, tensor in tensors.items()}


NAMES = st.sampled_from(sorted(NPZ))


@mutation
def good_npz(draw):
  tensors = draw(st.sampled_from([NPZ, UNSTACKED]))
  members = _members(tensors)
  for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3, unique=True)):
    if draw(st.booleans()):  # Dimensions in Fortran's order, or another version of the header.
      members[f"{name}.npy"] = npy(np.asfortranarray(tensors[name]))
    else:
      sink = io.BytesIO()
      np.lib.format.write_array(sink, tensors[name], version=(2, 0))
      members[f"{name}.npy"] = sink.getvalue()
  return npz_case(members, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))), WORKS


@mutation
def size_of_a_tensor_in_npz(draw):
  name, members = draw(NAMES), _members()
  shape = NPZ[name].shape
  kind = draw(st.sampled_from(["one", "all", "layers", "negative", "huge", "many"]))
  huge = draw(st.sampled_from([2**20, 10**12, 2**40, 2**62, 10**30, 10**400]))
  bad = {
    "one": (huge, *shape[1:]),
    "all": (huge,) * len(shape),
    "layers": (*shape[:-1], huge),
    "negative": (-1, *shape[1:]),
    "huge": (huge,),
    "many": (1,) * 100,
  }[kind]
  members[f"{name}.npy"] = npy_header("<f4", bad) + NPZ[name].tobytes()
  return npz_case(members), refused("tower.npz")


@functools.cache
def _wide(width):
  return engine.Inverse(tables.BIG_VISION_STACKED, define_vision(ARGUMENTS | {"embed_dim": width})[1])


@mutation
def sizes_of_all_tensors_in_npz(draw):
  """A tower of any size, whose headers agree with each other; there is nothing behind them."""
  width = draw(st.sampled_from([2**12, 2**15, 2**18, 2**20]))
  shapes = _wide(width).shape
  members = {f"{name}.npy": npy_header("<f4", shapes(name.removeprefix("params/img/"))) + bytes(64) for name in NPZ}
  return npz_case(members), refused("tower.npz")


@mutation
def packed_zeros_in_npz(draw):
  """Tensors of many gigabytes that are packed into a few kilobytes: only the size in the zip file is a lie."""
  name, members = draw(NAMES), _members()
  width = draw(st.sampled_from([10**5, 10**6, 5 * 10**6]))
  members[f"{name}.npy"] = npy_header("<f4", (*NPZ[name].shape[:-1], width)) + bytes(4 * width)
  return npz_case(members, zipfile.ZIP_DEFLATED), refused("tower.npz")


@mutation
def type_of_a_tensor_in_npz(draw):
  name, members = draw(NAMES), _members()
  kind = draw(st.sampled_from(["<i4", "<f8", "|b1", "<c8", "|S4", "<U1", "|V4", "|V3", "|u1", "<M8[s]", "float8"]))
  tensor = NPZ[name]
  if kind == "float8":
    content = npy(tensor.astype(ml_dtypes.float8_e4m3fn).view("V1"))
  else:
    content = npy_header(kind, tensor.shape) + bytes(np.dtype(kind).itemsize * tensor.size)
  members[f"{name}.npy"] = content
  return npz_case(members), refused("tower.npz")


@mutation
def header_of_a_tensor_in_npz(draw):
  name, members = draw(NAMES), _members()
  raw = draw(
    st.sampled_from(
      [
        "",
        "None",
        "[" * 3_000,
        "{" * 200,
        "__import__('os').abort()",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': 'no', 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 3}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ('a',)}",
        "{'descr': [], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5_000 + ",)}",
        "-" * 20_000,
        "\0" * 40,
      ]
    )
  )
  version = draw(st.sampled_from([1, 2, 3, 9]))
  members[f"{name}.npy"] = draw(
    st.sampled_from(
      [npy_header("", (), version=version, raw=raw), b"\x93NUMPY", b"", b"\x80\x04.", b"\x93NUMPY\2\0\xff\xff\xff\xff"]
    )
  )
  return npz_case(members), refused("tower.npz")


@mutation
def name_of_a_tensor_in_npz(draw):
  name, members = draw(NAMES), _members()
  kind = draw(st.sampled_from(["missing", "twice", "more", "suffix", "long"]))
  content = members[f"{name}.npy"]
  if kind != "twice" and kind != "more":
    del members[f"{name}.npy"]
  found = list(members.items())
  found += {
    "missing": [],
    "twice": [(f"{name}.npy", content)],
    "more": [("params/img/other.npy", content)],
    "suffix": [(name, content)],
    "long": [("x" * 60_000, content)],
  }[kind]
  return npz_case(found), refused("tower.npz")


@mutation
def numbers_of_layers_in_npz(draw):
  members = _members(UNSTACKED)
  number = draw(st.sampled_from(["2", "7", "1000000", "1" + "0" * 12, "9" * 5_000, "-1", "\u0661"]))
  for name in [name for name in members if "encoderblock_1/" in name]:
    members[name.replace("encoderblock_1/", f"encoderblock_{number}/")] = members.pop(name)
  return npz_case(members), refused("tower.npz")


@mutation
def npz_cut_off(draw):
  case = npz_case(_members())
  case.files["tower.npz"] = values.cut_off(draw, case.files["tower.npz"])
  return case, refused("tower.npz")


@mutation
def npz_with_flipped_bits(draw):
  case = npz_case(_members(), draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))
  case.files["tower.npz"] = values.bytes_flipped(draw, case.files["tower.npz"])
  return case, Expected(TOWER, ("tower.npz",))


@mutation
def other_contents_of_npz(draw):
  content = draw(
    st.one_of(st.binary(max_size=60), st.sampled_from([b"PK\3\4", b"PK\5\6" + bytes(18), b"\x93NUMPY\1\0"]))
  )
  return Weights({"tower.npz": content}), refused("tower.npz")


# safetensors


_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "float64": "F64", "uint8": "U8"}


def entries(tensors):
  """Returns the header and the data of a file."""
  header, data = {}, b""
  for name, tensor in tensors.items():
    content = tensor.tobytes()
    header[name] = {
      "dtype": _TYPES.get(tensor.dtype.name, "F8_E4M3"),
      "shape": list(tensor.shape),
      "data_offsets": [len(data), len(data) + len(content)],
    }
    data += content
  return header, data


def safetensors(header, data, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def folder(config=None, **files):
  """Returns a folder with a config and, unless others are given, one file of weights."""
  config = json.dumps(_CONFIG if config is None else config).encode()
  return Weights({"config.json": config} | (files or {"model.safetensors": safetensors(*entries(SAFETENSORS))}))


TENSORS = st.sampled_from(sorted(SAFETENSORS))


@mutation
def good_safetensors(draw):
  header, data = entries(SAFETENSORS)
  if draw(st.booleans()):
    header["__metadata__"] = {"format": "pt", draw(values.TEXTS): "x"}
  return folder(**{"model.safetensors": safetensors(header, data + b"")}), WORKS


@mutation
def offsets_of_a_tensor(draw):
  header, data = entries(SAFETENSORS)
  entry = header[draw(TENSORS)]
  start, end = entry["data_offsets"]
  bad = [
    [start, end + 4],
    [start + 4, end + 4],
    [end, start],
    [0, 2**62],
    [2**63, 2**64 - 1],
    [-4, end],
    [start, 10**30],
  ]
  bad += [[start], [], "x", [0.5, end], None, [start - 4, end] if start else [start, end - 4]]
  entry["data_offsets"] = draw(st.sampled_from(bad))
  return folder(**{"model.safetensors": safetensors(header, data)}), refused("model.safetensors")


@mutation
def overlapping_tensors(draw):
  header, data = entries(SAFETENSORS)
  one, other = draw(st.lists(TENSORS, min_size=2, max_size=2, unique=True))
  header[one]["data_offsets"] = header[other]["data_offsets"]
  return folder(**{"model.safetensors": safetensors(header, data)}), refused("model.safetensors")


@mutation
def shape_of_a_tensor(draw):
  header, data = entries(SAFETENSORS)
  name = draw(TENSORS)
  shape = header[name]["shape"]
  bad = [
    [*shape, 2],
    [2**40],
    [2**62, 4],
    [-1, *shape],
    [10**30],
    ["a"],
    [1.5],
    None,
    "x",
    [0],
    [shape[0] + 1, *shape[1:]],
  ]
  header[name]["shape"] = draw(st.sampled_from(bad))
  return folder(**{"model.safetensors": safetensors(header, data)}), refused()


@mutation
def type_of_a_tensor(draw):
  name = draw(TENSORS)
  kind = draw(st.sampled_from(["float8_e4m3fn", "int64", "float64", "uint8"]))
  tensors = SAFETENSORS | {name: SAFETENSORS[name].astype(kind)}
  header, data = entries(tensors)
  header[name]["dtype"] = (
    draw(st.sampled_from(["F8_E5M2", "F8_E4M3"])) if kind.startswith("float8") else header[name]["dtype"]
  )
  return folder(**{"model.safetensors": safetensors(header, data)}), refused("model.safetensors", name)


@mutation
def unknown_type_of_a_tensor(draw):
  header, data = entries(SAFETENSORS)
  header[draw(TENSORS)]["dtype"] = draw(st.sampled_from(["F33", "", "object", None, 4, "BF16"]))
  return folder(**{"model.safetensors": safetensors(header, data)}), refused("model.safetensors")


@mutation
def length_of_the_header(draw):
  header, data = entries(SAFETENSORS)
  length = draw(st.sampled_from([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, 99_999_999]))
  return folder(**{"model.safetensors": safetensors(header, data, length)}), refused("model.safetensors")


@mutation
def other_header(draw):
  raw = draw(st.sampled_from([b"{}", b"[]", b"null", b"{" * 50_000, b'{"a": 1}', b"\xff", b"", b'{"a": {}}', b'"x"']))
  return folder(**{"model.safetensors": safetensors(raw, b"")}), refused()


@mutation
def safetensors_cut_off(draw):
  case = folder()
  case.files["model.safetensors"] = values.cut_off(draw, case.files["model.safetensors"])
  return case, refused("model.safetensors")


@mutation
def header_with_flipped_bits(draw):
  header, data = entries(SAFETENSORS)
  text = values.bytes_flipped(draw, safetensors(header, b""))
  return folder(**{"model.safetensors": text + data}), Expected("anything", ())


def _sharded(weight_map=None, drop=None):
  """Returns a folder with two files and their index."""
  names = sorted(SAFETENSORS)
  parts = names[::2], names[1::2]
  files = {
    shard: safetensors(*entries({name: SAFETENSORS[name] for name in part}))
    for shard, part in zip(SHARDS, parts, strict=True)
  }
  places = {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}
  files[INDEX] = json.dumps(
    {"metadata": {}, "weight_map": places if weight_map is None else weight_map(places)}
  ).encode()
  files.pop(drop, None)
  return folder(**files)


@mutation
def good_shards(draw):
  return _sharded(), WORKS


@mutation
def place_in_a_weight_map(draw):
  bad = ["/etc/passwd", "../model.safetensors", "a/b.safetensors", "..", ".", "", "\0", "x" * 5_000, "./" + SHARDS[0]]
  bad += [
    "/proc/self/mem",
    "..\\x",
    "other.safetensors",
    None,
    3,
    [],
    {},
    SHARDS[0] + "\n",
    "\ud800",
    INDEX,
    "config.json",
  ]
  value, name = draw(st.sampled_from(bad)), draw(TENSORS)
  return _sharded(lambda places: places | {name: value}), refused()


@mutation
def other_index(draw):
  case = _sharded()
  case.files[INDEX] = draw(
    st.sampled_from(
      [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": 3}', b"[" * 99_999]
    )
  )
  return case, refused()


@mutation
def missing_shard(draw):
  shard = draw(st.sampled_from(SHARDS))
  return _sharded(drop=shard), refused(shard)


@mutation
def tensor_in_two_shards(draw):
  case, name = _sharded(), draw(TENSORS)
  for shard in SHARDS:
    names = {name, *sorted(SAFETENSORS)[SHARDS.index(shard) :: 2]}
    case.files[shard] = safetensors(*entries({each: SAFETENSORS[each] for each in sorted(names)}))
  return case, refused("duplicate", name)


@mutation
def value_in_the_config(draw):
  key = draw(st.sampled_from(sorted(_CONFIG)))
  bad = st.one_of(
    st.sampled_from([None, True, "8", "", [], {}, 0, -1, 1.5, 2**31, 2**62, 10**12, 10**30, 1e300, float("nan")]),
    values.values_except(str, int, float),
  )
  value = draw(bad)
  if key == "layer_norm_eps" and type(value) in (int, float) and 0 < value < 1:
    value = 0
  return folder(_CONFIG | {key: value}), refused("config.json", key if key != "model_type" else "model_type")


@mutation
def integer_with_thousands_of_digits_in_the_config(draw):
  text = json.dumps(_CONFIG).replace("12", draw(values.HUGE_INTEGERS))
  case = folder()
  case.files["config.json"] = text.encode()
  return case, refused("config.json")


@mutation
def other_config(draw):
  case = folder()
  case.files["config.json"] = draw(
    st.sampled_from([b"", b"{", b"[]", b"3", b"\xff", b"[" * 99_999, b'{"model_type": []}'])
  )
  return case, refused("config.json")


@mutation
def no_config(draw):
  case = folder()
  del case.files[draw(st.sampled_from(["config.json", "model.safetensors"]))]
  return case, refused()
