"""Names of what stands in a workdir, and how its JSON files are written."""

import json
import os
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
EMBEDDINGS = "embeddings"
INDEX = "index"
TOKENIZER = "tokenizer"
FACTS = "inference.json"
"""Hashes of the tokenizer's files, and how the image features were made."""


def write_json(path: Path, value: Any) -> None:
  """Whole or not at all."""
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  os.replace(partial, path)
