"""Sizes of data sets: published, given, unknown or impossible."""

import pytest

from tests.helpers.miniature_runs import load_config
from vixml_jax.ahead_of_time.sizes import data_size
from vixml_jax.errors import InputError


def test_published_sizes_need_no_data():
  size = data_size(load_config("lf_amazon_1.3m", "images=3"))
  assert (size.train, size.labels, size.tokens, size.images) == (2_248_619, 1_305_265, 15.0, 3.0)
  assert data_size(load_config("lf_amazon_131k")).tokens == 128
  given = data_size(load_config("lf_amazon_1.3m"), num_queries=1000, tokens=20.0)
  assert (given.train, given.labels, given.tokens) == (1000, 1_305_265, 20.0)


@pytest.mark.parametrize(
  "arguments,message",
  [
    (dict(), "custom: its size is not known.*--num_queries and --num_labels"),
    (dict(num_queries=0, num_labels=5), "--num_queries=0: must be at least 1"),
    (dict(num_queries=5, num_labels=5, tokens=64.0), "--tokens_per_item=64: must be between 3 and .*max_length=32"),
    (dict(num_queries=5, num_labels=5, images=1.0), "--images_per_item=1: .*config.images=0"),
  ],
)
def test_an_unknown_or_impossible_size_raises_an_error_that_names_the_flag(arguments, message, tmp_path):
  config = load_config("custom")
  config.dataset.data_dir = str(tmp_path)
  with pytest.raises(InputError, match=message):
    data_size(config, **arguments)
