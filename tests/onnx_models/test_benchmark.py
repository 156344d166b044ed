"""`benchmarks.int8_encoding` prints speed and accuracy of a miniature workdir."""

import re
import shutil
import sys

import pytest

from benchmarks import int8_encoding

pytest.importorskip("onnx", reason="needs onnx: pip install -c constraints.txt -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -c constraints.txt -e '.[onnx]'")


def test_the_benchmark_prints_speed_and_accuracy(with_images, tmp_path, monkeypatch, capsys):
  workdir = shutil.copytree(with_images.workdir, tmp_path / "run")
  arguments = ["--size=tiny", "--rounds=1", f"--workdir={workdir}", f"--raw_dir={with_images.raw}"]
  monkeypatch.setattr(sys, "argv", ["int8_encoding", *arguments])
  int8_encoding.main()
  printed = capsys.readouterr().out
  assert (
    len(re.findall(r"int8 is [\d.]+ times as fast, [\d.]+ times in CPU time; cosine (?:0\.99|1\.00)", printed)) == 3
  )
  # The trained encoder finds what evaluation found.
  rows = re.findall(r"float32  P@1 ([\d.]+), P@5 [\d.]+, R@100 [\d.]+", printed)
  assert len(rows) == 2 and float(rows[0]) == round(with_images.final["P@1"], 2)
  assert printed.count("P@1 of int8 - float32: ") == 2
