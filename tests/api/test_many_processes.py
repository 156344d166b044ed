"""`vixml_jax.train` in two processes: one run on the devices of both, and a model in each."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.miniature import read_lines
from tests.helpers.miniature_runs import miniature_config
from tests.helpers.repository import ROOT
from vixml_jax.run import configuration

PROGRAM = """
import json, sys
from pathlib import Path
import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import vixml_jax
from vixml_jax.run import configuration

folder, workdir, table = sys.argv[3:]
dataset = vixml_jax.Dataset.from_table(table, data_dir=folder + "/tables")
assert jax.process_count() == 2 and jax.device_count() == 4
steps = []

class Steps(vixml_jax.Callback):
  def on_step(self, step, metrics):
    steps.append(metrics["loss"])
    if step == 7:
      raise vixml_jax.StopTraining("enough")

model = vixml_jax.train(dataset, configuration.read(Path(folder, "config.json")), workdir=workdir, callbacks=[Steps()])
found = {
  "labels": [prediction.label for prediction in model.predict(["arrow up"], k=3)[0]],
  "embedding": model.encode(["arrow up"])[0].tolist(),
  "P@1": model.evaluate(dataset)["P@1"],
  "metric": model.metrics["P@1"],
  "losses": steps,
}
for name, change in dict(
  add_labels=lambda: model.add_labels([{"uid": "otter", "title": "horse fish"}]),
  delete_labels=lambda: model.delete_labels(["otter"]),
  save=lambda: model.save(workdir + "-saved"),
).items():
  try:
    change()
  except vixml_jax.InputError as error:
    found[name] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_train_one_model_and_each_has_it(tmp_path):
  config = miniature_config(tmp_path)
  config.eval.update(dict(retrieval_augmented=False, blend=False, baselines=()))
  config.train.epochs = 3
  configuration.write(config, tmp_path / "config.json")
  records = [record for record in read_lines(tmp_path / "raw" / "trn.json.gz") if record["title"]]
  rows = [{"text": record["title"], "labels": [f"label {i}" for i in record["target_ind"]]} for record in records]
  table = tmp_path / "table.jsonl"
  table.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  flags = os.environ["XLA_FLAGS"].replace("_device_count=8", "_device_count=2")  # See conftest.
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, address, str(number), str(tmp_path), str(tmp_path / "run"), str(table)],
      env=os.environ | {"XLA_FLAGS": flags},
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for number in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=600) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in outputs)
  first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
  assert len(first["losses"]) >= 7 and first["losses"] == second["losses"]
  assert first["labels"] == second["labels"] and first["P@1"] == second["P@1"] == first["metric"]
  np.testing.assert_allclose(first["embedding"], second["embedding"], atol=1e-6)
  for name in ("add_labels", "delete_labels", "save"):
    assert name not in first
    assert second[name].startswith(f"{name}: this is process 1, and only process 0 writes")
  assert (tmp_path / "run-saved" / "config.json").exists()
