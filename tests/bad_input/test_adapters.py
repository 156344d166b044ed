"""Adapters and configs of encoders are read as they are, or refused with one line that names the file and the key."""

from pathlib import Path
import tempfile

import jax
import numpy as np

from tests.bad_input import adapters, campaign
from tests.bad_input.campaign import Refused
from vixml_jax.weights import hf_config, peft


def _load(folder):
  if (folder / "config.json").exists():
    return hf_config.encoder_arguments(folder)
  return peft.load_adapter(folder, adapters.ABSTRACT, adapters.ALPHA)


def _check(tally, case):
  files, expected = case
  with tempfile.TemporaryDirectory() as place:
    for name, content in files.items():
      (Path(place) / name).write_bytes(content)
    found = tally.attempt(lambda: _load(Path(place)))
  if isinstance(found, Refused):
    tally.judge(found, expected)
  elif expected.value == "adapters":
    jax.tree.map(np.testing.assert_array_equal, found, adapters.ADAPTERS)
  else:
    assert expected.value == "config", ("accepted", found)
    assert (found["vocab_size"], found["num_layers"], found["embed_dim"], found["num_heads"]) == (64, 2, 8, 4)


@campaign.examples_of_each(100)
def test_adapters(each, record_property):
  campaign.run("adapters and configs of encoders", adapters.MUTATIONS, _check, each, record_property)
