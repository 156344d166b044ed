"""Slices of TPU chips by name."""

import pytest

from vixml_jax.ahead_of_time import chips
from vixml_jax.errors import InputError


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v5e:2x2x2", "h100:4x4", "v5p:2x2"])
def test_an_unknown_topology_raises_an_error_with_examples(topology):
  with pytest.raises(InputError, match=f"--topology={topology}: .*v5e:4x4"):
    chips.tpu_slice(topology)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '\.\[tpu\]'"):
    chips.tpu_slice("v5e:2x2")
