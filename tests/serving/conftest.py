"""A predictor with images, and a server that tests of one file share."""

from collections.abc import Iterator

import pytest

from tests.helpers.http_server import quick_to_stop, running
from tests.helpers.trained_workdirs import Trained
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.predictor import Predictor
from vixml_jax.serving.server import Server


@pytest.fixture(scope="session")
def predictor(with_images: Trained) -> Predictor:
  """Predictor of the workdir `with_images`."""
  return load_predictor(with_images.workdir)


@pytest.fixture(scope="module")
def server(predictor: Predictor) -> Iterator[Server]:
  """Running server of `predictor`."""
  with quick_to_stop(), running(lambda: predictor) as server:
    yield server
