"""A trace of chosen steps, which the profilers of JAX read."""

import gzip
import json

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData
import pytest

from configs.common import base_config
from vixml_jax.errors import InputError
from vixml_jax.run import configuration
from vixml_jax.training.step_profiler import StepProfiler


def test_the_trace_of_chosen_steps_can_be_read(tmp_path):
  step = jax.jit(lambda x: jnp.sin(x) @ x)
  x = step(jnp.ones((64, 64)))
  with StepProfiler(tmp_path, "2:3") as profiler:
    for number in range(1, 6):
      profiler.before(number)
      with jax.profiler.TraceAnnotation(f"step {number}"):
        x = step(x)
      profiler.after(number, x)
      assert number < 3 or any((tmp_path / "profile").rglob("*.xplane.pb"))
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  names = {
    event.name for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for event in line.events
  }
  assert {"step 2", "step 3"} <= names and not {"step 1", "step 4", "step 5"} & names


def test_a_trace_is_whole_when_a_run_ends_within_its_steps(tmp_path):
  with StepProfiler(tmp_path, "1:9") as profiler:
    profiler.before(1)
    jnp.ones(3).block_until_ready()
  (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_without_steps_no_trace_is_written(tmp_path):
  with StepProfiler(tmp_path, "") as profiler:
    profiler.before(1)
    profiler.after(1, None)
  assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", ["3", "3:2", "0:2", "a:b", "1:2:3"])
def test_steps_that_are_no_range_are_refused(steps):
  config = base_config()
  config.name, config.dataset.name, config.profile.steps = "x", "custom", steps
  with pytest.raises(InputError, match=f"config.profile.steps='{steps}': must be empty, or FIRST:LAST"):
    configuration.check(config)
