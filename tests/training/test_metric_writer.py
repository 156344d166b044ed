"""Metrics of a run that is continued: no repeats, no damaged lines, and event files that TensorBoard reads."""

import json
import struct

import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

from vixml_jax.training.metric_writer import MetricWriter


def write(folder, first_step, steps):
  with MetricWriter(folder, first_step) as writer:
    for step in steps:
      writer.write(step, 0, "train", {"loss": step / 8, "P@1": 0.5})
    writer.sync()


def steps_of(folder):
  return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_continued_run_repeats_no_step(tmp_path):
  write(tmp_path, 0, range(1, 6))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "ep')  # A kill cuts the last line.
  write(tmp_path, 3, range(4, 7))
  assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_the_lines_after_the_last_step_of_an_epoch_are_written_again_where_they_are_due(tmp_path):
  with MetricWriter(tmp_path, 0) as writer:
    for split in ("train", "epoch", "test"):
      writer.write(4, 0, split, {"loss": 1.0})
  for due, expected in ((False, ["train", "epoch", "test"]), (True, ["train"])):
    with MetricWriter(tmp_path, 4, epoch_end_due=due):
      pass
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["split"] for line in lines] == expected


@pytest.mark.parametrize("line", [b"\xff\x00", b"[]", b"{}", b'{"step": 1, "epo'], ids=["bytes", "list", "keys", "cut"])
def test_a_damaged_line_is_dropped_and_named(tmp_path, caplog, line):
  write(tmp_path, 0, range(1, 4))
  lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
  lines[1] = line
  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
  write(tmp_path, 3, [4])
  assert steps_of(tmp_path) == [1, 3, 4]
  assert caplog.messages == [f"{tmp_path}/metrics.jsonl:2: is damaged, so it is dropped"]


def events_of(folder):
  """Returns the events of the only file in a folder, without their times."""
  (path,) = folder.iterdir()
  content, start, events = path.read_bytes(), 0, []
  while start < len(content):
    (size,) = struct.unpack("<Q", content[start : start + 8])
    event = Event.FromString(content[start + 12 : start + 12 + size])
    events.append((event.step, str(event.session_log), str(event.summary)))
    start += size + 16
  return events


def test_event_files_are_those_of_tensorboardx(tmp_path):
  write(tmp_path, 3, [4, 5])
  with SummaryWriter(str(tmp_path / "theirs"), purge_step=4) as theirs:
    for step in (4, 5):
      theirs.add_scalar("train/loss", step / 8, step)
      theirs.add_scalar("train/P@1", 0.5, step)
  # Theirs repeats the version of the format before the session.
  assert events_of(tmp_path / "tensorboard") == [
    event for event in events_of(tmp_path / "theirs") if event != (4, "", "")
  ]
