"""A request for more labels than there are gets all of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from vixml_jax.inference.queries import QueryFormat
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.request_parser import RequestParser


@pytest.mark.parametrize(("asked", "found"), [(2, 2), (3, 3), (50, 3)])
def test_k_is_at_most_the_number_of_labels(asked, found):
  encoder = SimpleNamespace(tokenizer=lambda texts: [np.zeros(1, np.int32)] * len(texts))
  model = SimpleNamespace(
    index=SimpleNamespace(num_live=3),
    predictor=SimpleNamespace(encoder=encoder, blend=None),
    labels=None,
    rankings=SimpleNamespace(predictors={"plain": None}, default=SimpleNamespace(name="plain")),
    explains=False,
    form=QueryFormat(("title",), 0, 0),
    reads_images=False,
  )
  body = json.dumps({"queries": [{"title": "sun"}], "k": asked}).encode()
  (request,) = RequestParser(Limits(k=100)).parse(body, model)
  assert request.k == found
