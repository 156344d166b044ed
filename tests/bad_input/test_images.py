"""Images give the pixels that they have, or one of the reasons why they have none."""

import numpy as np
import pytest

from tests.bad_input import campaign, images
from tests.bad_input.campaign import Refused
from vixml_jax.images.decoding import BadImage, decode

# As in `decoding`; the filters of pytest come first.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def _check(tally, case):
  blob, expected = case
  found = tally.attempt(lambda: decode(blob), errors=(BadImage,))
  if isinstance(found, Refused):
    assert expected.naming and found.message in expected.naming, (found, expected)
    return
  assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
  wanted = expected.value
  assert wanted is not None, ("accepted", found.shape)
  match wanted:
    case images.ANY, shape:
      assert shape is None or found.shape == shape
    case "near", pixels, distance:
      assert found.shape == pixels.shape and np.abs(found - pixels).max() <= distance
    case "any order", pixels:
      assert sorted(found.ravel()) == sorted(pixels.ravel())
    case pixels:
      np.testing.assert_array_equal(found, pixels)


@campaign.examples_of_each(100)
def test_images(each, record_property):
  campaign.run("images", images.MUTATIONS, _check, each, record_property)
