"""The flag `--compile_cache` of the entry points that compile programs.

An entry point calls `define` when it is imported. absl lists the flag in its `--help`, because this module disclaims
it.
"""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
  from vixml_jax.inference.shared_programs import SharedPrograms

flags.disclaim_key_flags()


def define() -> flags.FlagHolder[str | None]:
  """Defines `--compile_cache`."""
  return flags.DEFINE_string(
    "compile_cache",
    None,
    "Folder for compiled programs, for the next start; by default ~/.cache/vixml_jax/compiled; empty for none. A URL "
    "(gs://, s3://, file://) is a place that machines share: programs are copied from it, and serve adds new ones.",
  )


def use(flag: flags.FlagHolder[str | None]) -> "SharedPrograms | None":
  """Keeps compiled programs as the flag says, from now on; returns what stores new ones where other servers read."""
  from vixml_jax.inference.compile_cache import use_compile_cache

  return use_compile_cache(flag.value)
