"""The label index in int8, in bits and with fewer dimensions: search, filters, edits, damage, refusals."""

import numpy as np
import pytest

from tests.helpers.damage import flip_a_bit
from tests.helpers.search_cases import (
  DIM,
  NUM_LABELS,
  NUM_TRAIN,
  brute_force,
  filters_and_mask,
  needs_scann,
  opened,
  unit,
  written,
)
from vixml_jax.errors import InputError
from vixml_jax.search import filters as filters_module
from vixml_jax.search.prefixes import ScaledPrefixes, scaled_prefix
from vixml_jax.search.vector_form import VectorForm

LABELS, TRAIN, QUERIES = unit(NUM_LABELS, 0), unit(NUM_TRAIN, 2), unit(5, 3)
# So few labels are all candidates, also of bits.
FORMS = [VectorForm("int8"), VectorForm("bit"), VectorForm("float32", 5), VectorForm("int8", 5), VectorForm("bit", 3)]
all_forms = pytest.mark.parametrize("form", FORMS, ids=str)


def cut(vectors, form):
  return vectors if form.dims is None else scaled_prefix(vectors, form.dims)


@all_forms
def test_labels_and_training_queries_are_found_as_by_brute_force(tmp_path, form):
  index = opened(written(tmp_path / "index"), form=form)
  for found, vectors in ((index.search(QUERIES, 6), LABELS), (index.query_index.search(QUERIES, 6), TRAIN)):
    scores, ids = brute_force(cut(vectors, form), cut(QUERIES, form), 6)
    np.testing.assert_array_equal(found[1], ids)
    np.testing.assert_allclose(found[0], scores, rtol=1e-5)
  assert index.dim == DIM, "labels are added with all dimensions"


@all_forms
def test_added_and_deleted_labels_change_what_is_found(tmp_path, form):
  index = opened(written(tmp_path / "index"), form=form).delete([4, 6])
  new = unit(3, 7)
  index = index.add(new, ["a", "b", "c"], ["n/0", "n/1", "n/2"], np.zeros(3, np.int32), delete=[5])
  assert index.form == form
  labels, live = np.concatenate([LABELS, new]), np.ones((5, NUM_LABELS + 3), bool)
  live[:, [4, 5, 6]] = False
  for found in (index, opened(index.folder, form=form)):
    ids = brute_force(cut(labels, form), cut(QUERIES, form), 6, live)[1]
    np.testing.assert_array_equal(found.search(QUERIES, 6)[1], ids)


@all_forms
@pytest.mark.parametrize("gather_at_most", [0, 100])
def test_filters_equal_brute_force(tmp_path, form, gather_at_most, monkeypatch):
  monkeypatch.setattr(filters_module, "GATHER_AT_MOST", gather_at_most)
  index = opened(written(tmp_path / "index"), form=form).delete([4, 6])
  filters, mask = filters_and_mask(index)
  _, ids = index.search(QUERIES, 5, filters)
  np.testing.assert_array_equal(ids, brute_force(cut(LABELS, form), cut(QUERIES, form), 5, mask)[1])


def test_a_flipped_bit_in_the_vectors_that_codes_are_made_of_is_found_when_the_index_is_opened(tmp_path):
  folder = written(tmp_path / "index")
  flip_a_bit(next(folder.glob("*/labels.npy")))
  with pytest.raises(InputError, match=r"labels.npy: is damaged"):
    opened(folder, form=VectorForm("int8"))


@pytest.mark.parametrize(
  ("form", "message"),
  [
    (VectorForm("int4"), "index_dtype='int4' is not known: use one of float32, int8, bit"),
    (VectorForm(dims=9), "dims=9: must be 1 to 8, the dimension of the vectors"),
    (VectorForm(dims=0), "dims=0: must be 1 to 8"),
  ],
)
def test_a_form_that_the_index_cannot_have_is_refused(tmp_path, form, message):
  with pytest.raises(InputError, match=message):
    opened(written(tmp_path / "index"), form=form)


@needs_scann
@pytest.mark.parametrize(
  ("form", "message"),
  [(VectorForm("bit"), "index_dtype=bit: needs search=exact"), (VectorForm(dims=4), "dims=4: needs")],
)
def test_scann_is_refused(tmp_path, form, message):
  with pytest.raises(InputError, match=message):
    opened(written(tmp_path / "index"), search="scann", form=form)


def test_prefixes_are_read_at_unit_norm_and_zeros_stay_zeros():
  vectors = np.concatenate([unit(3, 0), np.zeros((1, DIM), np.float32)])
  prefixes = ScaledPrefixes(vectors, 4)
  assert (len(prefixes), prefixes.shape, prefixes.dtype) == (4, (4, 4), np.float32)
  np.testing.assert_allclose(np.linalg.norm(prefixes[0:3], axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(prefixes[np.asarray([3, 1])], scaled_prefix(vectors, 4)[[3, 1]])
  np.testing.assert_array_equal(prefixes[np.asarray([3])], 0)
