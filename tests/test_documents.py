"""What the Markdown pages name exists, and their code is valid: keys, flags, commands, files, headings, Python."""

import contextlib
import io
from pathlib import Path

import pytest

from tests.helpers.document_checks import CHECKS
from tests.helpers.documents import ROOT, Document, needs_a_trained_model, tracked_pages

PAGES = [path.relative_to(ROOT).as_posix() for path in tracked_pages()]
# Their blocks form one script for each section.
EXECUTED_ELSEWHERE = {
  "docs/extending.md": "tests/test_extending.py",
  "docs/api.md": "tests/api/test_page.py",
  "docs/serving.md": "tests/serving/test_embeddings.py",
  "docs/tutorial.md": "tests/test_tutorial.py",
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("check", CHECKS)
def test_page_is_true(check, page):
  assert CHECKS[check](Document.read(ROOT / page)) == []


def test_all_pages_are_covered_and_listed_in_the_readme():
  assert {"README.md", "CONTRIBUTING.md", "launch/README.md", "docs/images.md", "docs/results.md"} <= set(PAGES)
  readme = (ROOT / "README.md").read_text("utf-8")
  listed = [page for page in PAGES if not page.startswith(".github/") and page != "README.md"]
  assert not [page for page in listed if f"]({page})" not in readme]


def test_the_page_of_the_launchers_is_on_the_site_with_links_of_the_site(monkeypatch):
  pytest.importorskip("mkdocs", reason="needs mkdocs: pip install -c constraints.txt -e '.[docs]'")
  from mkdocs.config import load_config
  from mkdocs.structure.files import Files

  from tools import site_pages

  config = load_config(str(ROOT / "mkdocs.yml"))
  monkeypatch.setattr(config.plugins, "_current_plugin", None, raising=False)  # mkdocs sets it while it builds.
  assert {"Launchers": "launch.md"} in next(part["Clusters"] for part in config.nav if "Clusters" in part)
  (page,) = site_pages.on_files(Files([]), config)
  assert page.src_uri == "launch.md" and "](scaling.md)" in page.content_string and "](../" not in page.content_string
  assert site_pages.on_page_markdown("See [launchers](../launch/README.md#gke).") == "See [launchers](launch.md#gke)."


def test_every_page_shows_a_command_or_code_on_its_first_screen():
  pages = [page for page in PAGES if page.startswith("docs/") or page in ("README.md", "launch/README.md")]
  late = [page for page in pages if min(block.line for block in Document.read(ROOT / page).blocks) > 30]
  assert not late


def test_python_blocks_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _prepare_custom_data(tmp_path)
  executed = []
  for page in PAGES:
    for block in Document.read(ROOT / page).blocks:
      if block.language == "python" and page not in EXECUTED_ELSEWHERE and not needs_a_trained_model(block.code):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
          exec(compile(block.code, f"{page}:{block.line}", "exec"), {"__name__": "page"})
        executed.append((page, output.getvalue()))
  assert ("docs/images.md", "True\n") in executed
  assert all((ROOT / test).is_file() for test in EXECUTED_ELSEWHERE.values())


def _prepare_custom_data(folder: Path) -> None:
  """Prepares a miniature in `data`, as `dataset.data_dir` is in the pages."""
  from tests.helpers.miniature import write_raw_folder  # Imports much, which the other tests do not need.
  from vixml_jax.datasets import prepare

  prepare("custom", str(write_raw_folder(folder / "raw")), str(folder / "data"))


# The checks can fail: each finds what is wrong in a page of one mistake, and nothing in the corrected page.
MISTAKES = {
  "key in prose": ("keys", "Set `fusion.order` to `after`.", "fusion.order"),
  "key with config": ("keys", "Set `config.fusion.order`.", "fusion.order"),
  "section in prose": ("keys", "Set `config.trian.epochs`.", "trian.epochs"),
  "key in Python": ("keys", "```python\nconfig.train.epoch = 3\n```", "train.epoch"),
  "key in a command": (
    "flags",
    "```bash\npython -m vixml_jax.main --config=configs/custom.py --config.train.epoch=3\n```",
    "config.train.epoch",
  ),
  "key of another encoder": (
    "flags",
    "```bash\npython -m vixml_jax.main --config=configs/custom.py --config.encoder.lora_rank=8\n```",
    "config.encoder.lora_rank",
  ),
  "flag of another command": (
    "flags",
    "```bash\npython -m vixml_jax.predict --workdir=runs/A \\\n  --topology=v5e:4x4\n```",
    "page.md:3: --topology",
  ),
  "flag in a pipe": ("flags", "```bash\necho x | python -m vixml_jax.serve --prot=1\n```", "--prot"),
  "flag in prose": ("flags", "Give `--wrokdir`.", "--wrokdir"),
  "flag of a command in prose": ("flags", "Run `python -m vixml_jax.export --k=3`.", "--k"),
  "flag of a script": ("flags", "```bash\npython benchmarks/make_filters.py --sclae=5\n```", "--sclae"),
  "flag of a launcher": ("flags", "```bash\nlaunch/slurm.sh --node=2 -- --config=configs/custom.py\n```", "--node"),
  "flag behind a launcher": (
    "flags",
    "```bash\nlaunch/slurm.sh --nodes=2 -- --confg=configs/custom.py\n```",
    "--confg",
  ),
  "config": ("flags", "```bash\npython -m vixml_jax.main --config=configs/other.py\n```", "configs/other.py"),
  "variant": ("flags", "```bash\npython -m vixml_jax.main --config=configs/custom.py:full\n```", "full"),
  "target of make": ("flags", "```bash\nmake quick-start\n```", "quick-start"),
  "variable of make": ("flags", "```bash\nmake test PYTEST_ARG=x\n```", "PYTEST_ARG"),
  "program": ("programs", "```bash\nvixlm train\n```", "vixlm"),
  "program in a session": ("programs", "```console\n$ vixml trian\nstep 1\n```", "vixml trian"),
  "flag of a short name": ("flags", "Run `vixml predict --topology=v5e:4x4`.", "--topology"),
  "config by name": ("flags", "```bash\nvixml train --config=quickstrat\n```", "quickstrat"),
  "variant by name": ("flags", "```bash\nvixml train --config=quickstart:fulll\n```", "fulll"),
  "script": ("programs", "```bash\npython benchmarks/trian_step.py\n```", "benchmarks/trian_step.py"),
  "module in a command": ("programs", "```bash\npython -m vixml_jax.train --workdir=x\n```", "vixml_jax.train"),
  "module in prose": ("programs", "Run `python -m vixml_jax.trian`.", "vixml_jax.trian"),
  "file in prose": ("files", "See `vixml_jax/search/filter.py`.", "search/filter.py"),
  "folder in prose": ("files", "See `benchmrks/`.", "benchmrks/"),
  "output file": ("files", "It writes `final_metric.json`.", "final_metric.json"),
  "file in a command": ("files", "```bash\npip install -r tests/requirements.txt\n```", "tests/requirements.txt"),
  "link": ("files", "See [results](docs/result.md).", "docs/result.md"),
  "heading": ("files", "# A title\n\nSee [there](#another-title).", "#another-title"),
  "name": ("names", "`vixml_jax.ragged.Raged` holds rows.", "vixml_jax.ragged.Raged"),
  "name in Python": ("names", "```python\nvixml_jax.laod('x')\n```", "vixml_jax.laod"),
  "width": ("columns", "word " * 25, "columns"),
  "environment in a command": ("spellings", "Run `.venv/bin/python -m vixml_jax.main`.", "page.md:1"),
  "document that readers lack": ("spellings", "METHOD.md says so.", "page.md:1"),
  "no language": ("languages", "```\nmake test\n```", "mark the code block"),
  "syntax": ("python", "```python\nx = (1\n```", "page.md:2"),
}
# The same without the mistake, and what must not be taken for one.
CORRECT = {
  "keys": (
    "`fusion.method`, `config.prompt.phrases.T`, `--config.encoder.lora_rank`, `features.py`, `config.json`\n\n"
    "```python\nconfig.train.update(dict(epochs=3))\n```"
  ),
  "flags": (
    "`vixml train --config=quickstart:full,images=3 --config.train.epochs=3`, `vixml describe --devices=4`, "
    "`--workdir=runs/A`, `--noretrieval_augmented`, `launch/tpu_pod.sh run --dry-run`\n\n```bash\n"
    "python -m vixml_jax.main --config=configs/custom.py:encoder=qwen2.5-0.5b --config.encoder.lora_rank=8 \\\n"
    "  --distributed\n"
    "launch/slurm.sh --nodes=2 --dry-run -- --config=configs/custom.py --config.train.epochs=3\n"
    "make test PYTEST_ARGS=tests/test_losses.py && gcloud storage ls --any-flag\n```"
  ),
  "programs": "```console\n$ python -m vixml_jax.main --help\nvixlm is no program here\n```",
  "files": (
    "# A title\n\n`final_metrics.json`, `docs/images.md`, `OUTPUT.stats.json`, `runs/NAME`, "
    "`{trn,tst,lbl}_images.parquet`, `mine.jsonl`, [here](#a-title), [there](https://example.org/x.md)\n\n```bash\n"
    "python -m vixml_jax.predict --queries=mine.jsonl --output=tests/OUTPUT.jsonl\n```"
  ),
  "names": (
    "`vixml_jax.ragged.Ragged`, `vixml_jax.load`, `vixml_jax.inference.predictor.Predictor.predict`, `vixml_jax.search`"
  ),
  "columns": "| " + "cell | " * 30 + "\n\n```text\n" + "word " * 25 + "\n```",
  "spellings": "Run `python -m vixml_jax.main`; `.venv/bin/python -m pip freeze` is another program. See section 3.2.",
  "languages": "```bash\nmake test\n```",
  "python": "```python\nx = (1)\n```",
}


def _page(folder: Path, text: str) -> Document:
  (folder / "page.md").write_text(text + "\n")
  return Document.read(folder / "page.md")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, tmp_path):
  check, text, named = MISTAKES[mistake]
  (finding,) = set(CHECKS[check](_page(tmp_path, text)))
  assert finding.startswith("page.md:") and named in finding


@pytest.mark.parametrize("check", CHECKS)
def test_a_correct_page_has_no_findings(check, tmp_path):
  assert CHECKS[check](_page(tmp_path, CORRECT[check])) == []


@pytest.mark.parametrize("text", ["```bash\necho 'open\n```", "```bash\necho x"])
def test_a_line_that_no_shell_reads_and_a_block_without_end_are_errors(text, tmp_path):
  with pytest.raises(ValueError, match=r"page\.md:2"):
    list(_page(tmp_path, text).commands())
