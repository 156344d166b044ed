"""Runs the blocks of docs/api.md as one script, on a miniature instead of the pretrained encoder."""

import contextlib
import csv
import io

import pytest

from tests.helpers.documents import ROOT, Document
from tests.helpers.miniature import read_lines
from vixml_jax.run import named_configs

PAGE = Document.read(ROOT / "docs" / "api.md")


@pytest.mark.slow
def test_the_page_runs(trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  records = read_lines(trained.dataset.raw_dir / "trn.json.gz")[:48]
  with (tmp_path / "products.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["text", "labels"])
    writer.writerows([record["title"], "|".join(f"name {i}" for i in record["target_ind"])] for record in records)
  small = trained.config.copy_and_resolve_references()
  small.eval.update(dict(every_epochs=0, bootstrap_samples=0))
  small.dataset.validation_fraction = 0.4

  def load(name, **values):
    if "eval.every_epochs" in values:  # The run that evaluates after each epoch needs one row only.
      values |= {"eval.blend": False, "eval.retrieval_augmented": False, "eval.retrieval_choose": False}
    return named_configs.with_overrides(small, values)

  monkeypatch.setattr(named_configs, "load", load)
  output = io.StringIO()
  code = "\n".join(block.code for block in PAGE.blocks if block.language == "python")
  with contextlib.redirect_stdout(output):
    exec(compile(code, "docs/api.md", "exec"), {"__name__": "page"})
  shown = PAGE.blocks[-1]
  assert shown.language == "text" and output.getvalue().endswith(shown.code.strip() + "\n")
  assert "Model('runs/products', labels=" in output.getvalue()
  assert (tmp_path / "models" / "products" / "config.json").exists()
