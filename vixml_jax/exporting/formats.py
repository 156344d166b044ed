"""The names of the formats and types of exports, in a module of its own because flags need them before any import."""

FORMATS = ("hf", "peft", "sentence-transformers", "onnx", "embeddings")
DTYPES = ("float32", "bfloat16", "float16", "int8")
