"""`benchmarks.new_labels` removes labels from a raw folder, and scores new and old labels separately."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.new_labels import score, write_without
from tests.helpers.miniature import read_lines, write_raw_folder
from tests.helpers.trained_workdirs import raw_records
from vixml_jax.datasets import raw
from vixml_jax.ragged import Ragged


def test_a_raw_folder_without_some_labels_keeps_everything_else(tmp_path):
  source, target = write_raw_folder(tmp_path / "raw", images=True), tmp_path / "less"
  lost = {0, 5, 23, *read_lines(source / "trn.json.gz")[7]["target_ind"]}  # Of row 7, nothing is left.
  write_without(source, target, np.isin(np.arange(24), list(lost)))
  assert raw.find_files(target)["test"].filter
  all_uids = [f"label/{i}" for i in range(24)]
  uids = [label["uid"] for label in read_lines(target / "lbl.json.gz")]
  assert uids == [uid for i, uid in enumerate(all_uids) if i not in lost]
  for split in ("train", "test"):
    before, after = raw_records(source, split), raw_records(target, split)
    remain = [row for row in before if split == "test" or not set(row["target_ind"]) <= lost]
    assert len(after) == len(remain) < (65 if split == "test" else 64)
    for row, former in zip(after, remain, strict=True):
      assert (row["uid"], row.get("images")) == (former["uid"], former.get("images"))
      assert [uids[i] for i in row["target_ind"]] == [all_uids[i] for i in former["target_ind"] if i not in lost]
      assert len(row["target_rel"]) == len(row["target_ind"])
    assert filter_pairs(target, split, after, uids) == {
      (query, label)
      for query, label in filter_pairs(source, split, before, all_uids)
      if label in uids and query in {row["uid"] for row in after}
    }
  schema = pq.read_schema(target / "trn_images.parquet")
  assert schema.names == ["row", "slot", "png"] and schema.field("row").type == pa.int32()


def filter_pairs(folder, split, rows, labels):
  pairs = (map(int, line.split()) for line in (folder / raw.SPLITS[split].filter).read_text().splitlines())
  return {(rows[row]["uid"], labels[label]) for row, label in pairs}


def test_scores_of_new_and_old_labels_leave_out_each_other_s_positives():
  to_id, is_new = np.asarray([1, 2, 3, 0]), np.asarray([False, False, False, True])
  ranked = [[0, 3, 1, 2], [3, 1, 0, 2], [1, 3, 0, 2]]  # Labels, best first; 3 is the new one.

  def searched(to_id):
    def search(exclude):
      ids = np.full((3, 100), -1)
      for row, labels in enumerate(ranked):
        left = [to_id[label] for label in labels if to_id[label] >= 0 and to_id[label] not in exclude[row]]
        ids[row, : len(left)] = left
      return ids

    return search

  truth, own = Ragged.from_rows([[0, 3], [1], [3, 2]]), Ragged.from_rows([[], [], [1]])
  found = score(searched(to_id), to_id, is_new, truth, own)
  # Query 0 has its old label first, which is no error of the new one; label 1 is query 2's own item.
  assert found["new"] == {"queries": 2, "P@1": 100.0, "R@10": 100.0, "R@100": 100.0}
  # Of old ones query 0 has its first; for query 1 the new label comes first, for query 2 another old one.
  assert found["old"] == {"queries": 3, "P@1": pytest.approx(100 / 3), "R@10": 100.0, "R@100": 100.0}
  assert found["all"] == {"queries": 3, "P@1": pytest.approx(200 / 3), "R@10": 100.0, "R@100": 100.0}
  without = np.asarray([0, 1, 2, -1])
  before = score(searched(without), without, is_new, truth, own)
  assert "new" not in before and before["old"]["P@1"] == pytest.approx(200 / 3)
