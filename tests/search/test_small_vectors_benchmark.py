"""`benchmarks.small_vectors` at a small size: each type prints its bytes, and recall against float32."""

import argparse
import re

from benchmarks import small_vectors


def test_each_type_prints_its_line(tmp_path, capsys):
  small_vectors.write_vectors(argparse.Namespace(output=tmp_path, labels=2_000, dim=16, groups=20, queries=24))
  for dtype in ("float32", "int8", "bit"):
    small_vectors.measure(tmp_path, dtype, 3)
  lines = capsys.readouterr().out.splitlines()
  pattern = r"^(\w+) +(\d+) bytes a label, memory .* queries/s, one query .* ms, recall@3 ([\d.]+) %"
  found = [re.match(pattern, line).groups() for line in lines]
  assert [row[:2] for row in found] == [("float32", "64"), ("int8", "24"), ("bit", "10")]
  assert found[0][2] == found[1][2] == "100.00" and float(found[2][2]) > 70
  assert lines[1].endswith("searches without proof")
