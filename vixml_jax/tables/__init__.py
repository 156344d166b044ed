"""Tables of texts and label names: read from files or from memory, checked, and written as a raw folder."""

from vixml_jax.tables.columns import Columns
from vixml_jax.tables.conversion import Conversion, write_raw_folder, write_raw_folder_in

__all__ = ["Columns", "Conversion", "write_raw_folder", "write_raw_folder_in"]
