"""Names of what stands in a workdir."""

CHECKPOINTS = "checkpoints"
EMBEDDINGS = "embeddings"
INDEX = "index"
TOKENIZER = "tokenizer"
INFERENCE_INFO = "inference.json"
"""Hashes of the tokenizer's files, and how the image features were made."""
