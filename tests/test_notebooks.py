"""The notebooks of docs/notebooks/ are stored with outputs, and run."""

import json
import os

import pytest

from tests.helpers.documents import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
  assert [path.stem for path in NOTEBOOKS] == ["icons", "own_data"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran(path):
  text = path.read_text("utf-8")
  cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
  assert kinds and "error" not in kinds
  assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
  assert len(text) < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
  nbformat, nbclient = (
    pytest.importorskip(package, reason=f"needs {package}: pip install -c constraints.txt -e '.[docs]'")
    for package in ("nbformat", "nbclient")
  )
  fast = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
  for name, value in (fast | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}).items():
    monkeypatch.setitem(os.environ, name, value)
  notebook = nbformat.read(path, 4)
  client = nbclient.NotebookClient(
    notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
  )
  client.execute()  # Raises if a cell fails.
  assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
