"""Tables of texts and label names: read from files or from memory, checked, and written as a raw folder."""

from vixml_jax.tables.columns import Columns
from vixml_jax.tables.conversion import Conversion, convert_shared, write_raw_folder

__all__ = ["Columns", "Conversion", "convert_shared", "write_raw_folder"]
