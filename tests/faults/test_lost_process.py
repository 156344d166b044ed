"""One of several processes is killed or hangs: the others name it and end, and all continue to the same bits."""

import re
import signal
import time

import pytest

from tests.helpers.miniature_runs import miniature_config
from tests.helpers.training_checks import assert_same_bits, final_state, joined_commands, read_step
from vixml_jax import joined_processes

pytestmark = pytest.mark.slow
_PROCESSES = 2
# When a process is lost: a line of process 0, or a number of steps. How: the signal to which process.
_CASES = {
  "training": (6, signal.SIGKILL, 1),
  "training, process 0": (6, signal.SIGKILL, 0),
  "training, does not answer": (6, signal.SIGSTOP, 1),
  "free vectors": (r"encode \d+ labels$", signal.SIGKILL, 1),
  "checkpoint": (8, signal.SIGKILL, 1),
  "mining": (r"epoch 2 of 4: .*", signal.SIGKILL, 1),
  "end": (r"epoch 4 of 4: .*", signal.SIGKILL, 1),
  "evaluation": (r"evaluate \d+ queries", signal.SIGKILL, 1),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Config and workdir of an undisturbed run of the same processes."""
  folder = tmp_path_factory.mktemp("lost")
  config = miniature_config(folder)
  config.train.epochs, config.checkpoint.every_steps, config.eval.every_epochs = 4, 4, 2
  outputs = _finish(_start(config, folder / "run"))
  assert "resuming" not in outputs[0]
  return config, folder / "run"


def _start(config, workdir):
  return joined_commands(config, workdir, _PROCESSES, devices=1)


def _finish(processes):
  outputs = [process.communicate(timeout=600)[0] for process in processes]
  assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
  return outputs


@pytest.mark.parametrize("case", _CASES)
def test_the_others_name_the_lost_process_and_end_and_all_continue(case, finished, tmp_path):
  config, undisturbed = finished
  when, number, victim = _CASES[case]
  processes = _start(config, tmp_path)
  if isinstance(when, int):
    while read_step(tmp_path) < when and all(process.poll() is None for process in processes):
      time.sleep(0.02)
  else:
    found = any(re.search(when, line.rstrip()) for line in processes[0].stdout)
    assert found, f"no line is like {when!r}"
  processes[victim].send_signal(number)
  lost = time.monotonic()
  others = [process for index, process in enumerate(processes) if index != victim]
  outputs = [process.communicate(timeout=120)[0] for process in others]
  seconds = time.monotonic() - lost
  processes[victim].kill()
  processes[victim].communicate()
  assert [process.returncode for process in others] == [joined_processes.STATUS] * len(others), "\n".join(outputs)
  assert seconds < 60
  for output in outputs:
    assert re.fullmatch(rf"lost process {victim} of {_PROCESSES}, .* to continue", output.splitlines()[-1]), output
  _finish(_start(config, tmp_path))
  assert_same_bits(final_state(config, undisturbed), final_state(config, tmp_path))
