"""Adds the folder configs/ to the wheel, as vixml_jax/configs; everything else about the package is in setup.cfg.

Declared here because the key `packages = find:` of setup.cfg cannot be combined with a package from another folder.
"""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["vixml_jax", "vixml_jax.*"]), "vixml_jax.configs"],
  package_dir={"vixml_jax.configs": "configs"},
)
