"""docs/reference.md names what exists, and all public names of the package."""

import re

from tests.helpers import repository
from tests.helpers.documents import ROOT
import vixml_jax

NAMES = re.findall(r"^::: vixml_jax\.([\w.]+)$", (ROOT / "docs" / "reference.md").read_text("utf-8"), re.MULTILINE)


def test_all_names_exist():
  assert len(NAMES) > len(vixml_jax.__all__)
  assert not [name for name in NAMES if not repository.is_name(name)]


def test_public_names_are_on_the_page():
  assert {*vixml_jax.__all__} <= {*NAMES}
