"""SIGTERM and Ctrl-C while a run trains."""

import signal
import subprocess
import sys
import threading

import pytest

from vixml_jax.errors import Preempted
from vixml_jax.training.preemption import Preemption

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def handlers():
  """Handlers before the test, which are restored."""
  before = [signal.getsignal(number) for number in NUMBERS]
  yield before
  for number, handler in zip(NUMBERS, before, strict=True):
    signal.signal(number, handler)


@pytest.mark.parametrize("number,error", [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_asks_for_a_stop_and_the_handlers_are_restored(handlers, number, error):
  with Preemption(lambda step: False) as preemption:
    assert not preemption.asked(1)
    signal.raise_signal(number)
    assert preemption.asked(2)
    assert type(preemption.error(2)) is error and "saved step 2" in str(preemption.error(2))
  assert [signal.getsignal(number) for number in NUMBERS] == handlers


def test_a_second_ctrl_c_stops_at_once(handlers):
  with pytest.raises(KeyboardInterrupt), Preemption(lambda step: False):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
  assert [signal.getsignal(number) for number in NUMBERS] == handlers


def test_a_signal_that_the_shell_ignores_stays_ignored(handlers):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with Preemption(lambda step: False) as preemption:
    signal.raise_signal(signal.SIGINT)
    assert not preemption.asked(1)


def test_another_thread_installs_no_handlers(handlers):
  seen = []

  def work():
    with Preemption(lambda step: False) as preemption:
      seen.extend([preemption.asked(1), *(signal.getsignal(number) for number in NUMBERS)])

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [False, *handlers]


@pytest.mark.parametrize("said", ["", "saved step 3"])
def test_a_command_that_is_interrupted_says_what_it_saved(said):
  code = f"from vixml_jax import cli\ndef main():\n  raise KeyboardInterrupt({said!r})\ncli.run(main)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", said)
