"""SIGKILL at random moments of saving checkpoints, C++ code of Orbax included: the newest whole step is right."""

import subprocess
import sys

import pytest

from tests.helpers.miniature_runs import ROOT

pytestmark = pytest.mark.faults
_KILLS = 40

# A process that has imported everything and forks: the child saves steps one after the other until it is killed. It
# prints the newest whole step that it found when it started, and whether its contents are right.
_SAVES = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer
from vixml_jax.run.state import TrainState

def state(step):
  return TrainState(*(jnp.full((2000, 16), step + i, jnp.float32) for i in range(6)))

def save(folder):
  with Checkpointer(folder, 2) as checkpointer:
    step = checkpointer.step_to_resume()
    if step is not None:
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
      found = checkpointer.restore(step, abstract, 1)
      for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(state(step))):
        np.testing.assert_array_equal(a, b)
      assert found.meta == {"step": step}
    print("found", step, flush=True)
    while True:
      step = (step or 0) + 1
      checkpointer.save(step, Checkpoint(state(step), None, {"step": step}))
      print("saved", step, flush=True)

rng = random.Random(0)
for number in range(int(sys.argv[2])):
  read, write = os.pipe()
  child = os.fork()
  if not child:
    os.dup2(write, 1)
    try:
      save(Path(sys.argv[1]))
    except BaseException:
      import traceback
      traceback.print_exc()
    os._exit(1)
  os.close(write)
  with os.fdopen(read) as lines:
    print(number, lines.readline().strip(), flush=True)
    saved = [lines.readline().strip() for _ in range(rng.randrange(3))]
    time.sleep(rng.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    saved += [line.strip() for line in lines]
  status = os.waitpid(child, 0)[1]
  print(number, saved[-1] if saved else "saved nothing", os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended")
"""


def test_killed_at_any_moment_of_saving_the_newest_whole_checkpoint_is_as_it_was_saved(tmp_path, record_property):
  folder = tmp_path / "checkpoints"
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", _SAVES, folder, str(_KILLS)], cwd=ROOT, text=True, capture_output=True
  )
  assert done.returncode == 0, done.stderr
  lines = [line.split() for line in done.stdout.splitlines()]
  found = [line[2] for line in lines if line[1] == "found"]
  saved = [line for line in lines if line[1] == "saved"]
  assert len(found) == len(saved) == _KILLS, done.stdout + done.stderr
  assert all(line[-1] == "9" for line in saved), done.stderr
  newest = 0
  for start, end in zip(found, saved, strict=True):
    # What was reported as saved is there; a step that was just being completed may be as well.
    assert newest <= (0 if start == "None" else int(start)) <= newest + 1, done.stdout
    newest = int(end[2]) if end[2].isdigit() else (0 if start == "None" else int(start))
  assert newest > _KILLS // 4, "the process was killed while it saved"
  record_property("kills: checkpoint", _KILLS)
