"""The formats of exports and their types, in a module of its own because flags need them before any import."""

_WEIGHTS = ("float32", "bfloat16", "float16")
DTYPES_OF = {
  "hf": _WEIGHTS,
  "peft": ("float32",),
  "sentence-transformers": _WEIGHTS,
  "onnx": ("float32", "int8"),
  "label-vectors": ("float32", "float16"),
}
"""Format -> the types that its numbers can have."""
FORMATS = tuple(DTYPES_OF)
DTYPES = tuple(dict.fromkeys(dtype for dtypes in DTYPES_OF.values() for dtype in dtypes))
