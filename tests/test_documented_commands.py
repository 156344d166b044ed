"""Every command of the pages runs, in a small checkout (`tests/helpers/page_checkout.py`).

A block of a page is run as one script of bash, in the order of the page, in a checkout of its own for each page. Python
blocks that load a trained run are run as well. A command that cannot be run as it is has a row in one of two tables:
`CHANGED` says what is run instead, and `NOT_HERE` why nothing is.
"""

import re
import socket

import pytest

from tests.helpers.documents import ROOT, Block, Document, needs_a_trained_model, shell_lines, tracked_pages

# Page -> the test that runs its commands, and compares what they print with the page.
ELSEWHERE = {"docs/tutorial.md": "tests/test_tutorial.py", "docs/api.md": "tests/api/test_page.py"}

# Page -> what its reader has done before.
_FEATURES = "vixml features --config={} --config.dataset.raw_dir=DIR --checkpoint=siglip2_so400m14_384.npz"
_ON_THE_LARGEST, _ON_TITLES = map(_FEATURES.format, ("lf_amazon_1.3m", "lf_amazon_titles_131k"))
BEFORE = {
  "README.md": _ON_THE_LARGEST,
  "docs/decoders.md": f"{_ON_THE_LARGEST} && {_ON_TITLES}",
  "docs/scaling.md": _ON_THE_LARGEST,
  "docs/deviations.md": "vixml features --config=lf_amazon_1.3m --config.dataset.raw_dir=DIR --published=DIR",
  "launch/README.md": f"cp -r DIR RAW && {_ON_THE_LARGEST}",
  "docs/images.md": "vixml prepare --config=lf_amazon_titles_131k --config.dataset.raw_dir=DIR",
}

# Pattern of the start of a line -> why it is not run.
NOT_HERE = {
  r"pip install ": "network; test_extras_of_the_pages_exist",
  r"gcloud ": "an account of Google Cloud",
  r"docker build ": "docker; tests/serving/test_containers.py reads the Dockerfile",
  r"kubectl ": "a cluster; tests/serving/test_containers.py checks the file by the schema of Kubernetes",
  r"apt-get |su postgres ": "root",
  r"python3 -m venv build/|build/\w+/bin/": "network: environments of CONTRIBUTING.md for tests with servers",
  r"VIXML_JAX_POSTGRES=|MLFLOW_SERVER=": "PostgreSQL, the server of MLflow",
  r"python -m vixml_jax\.main .*--config\.track\.": "servers of trackers; tests/training/test_trackers.py",
  r"python examples/(pgvector|qdrant)/load\.py ": "a database; tests/exporting/test_vector_databases.py",
  r"\.ci/run": "minutes; CI runs it",
  r"\.ci/images": "docker; .github/workflows/images.yml",
  r"git clone https|python -m benchmarks\.wordnet_table |vixml train --data=wordnet": (
    "network; tests/test_wordnet_table.py and the tables of docs/tutorial.md"
  ),
  r"python tools/train_icon_tower\.py ": "icons of 64 pixels; tests/test_icon_tower.py",
}

# Pattern -> what is run instead, with the reason.
CHANGED = [
  (r" +# .*", ""),  # A comment, after which nothing could be added.
  # Servers go on while the page asks them, at a free port.
  (r"^(vixml serve|python -m vixml_jax\.serve) ", r"start_server \1 "),
  (r"\b8080\b", "$PORT"),
  # Compilers for accelerators are not installed: flags and config are read, and the last line says so.
  (
    r"^(vixml compile|python -m vixml_jax\.aot_compile|python -m benchmarks\.cost_growth --parts=labels)",
    r"must_say 'is not installed, which compiles' \1",
  ),
  # Rounding crosses the thresholds of a blend that is fitted on a miniature.
  (r" --idle_seconds=5", r"\g<0> --ranking=plain"),
  # Launchers print their commands; tests/launch runs them with replaced programs.
  (r"^(launch/\w+\.sh)(?!.* --dry-run )((?: [a-z]+)?)", r"\1\2 --dry-run"),
  # A bucket is a folder; tests/inference/test_buckets.py reads and writes object stores. Launchers only print.
  (r"^(?!launch/).*gs://BUCKET/.*$", lambda found: found[0].replace("gs://BUCKET/", "")),
  # Make shows what it would run, where that takes minutes or installs packages.
  (r"^make (test|coverage|lint|types|clean|sbom|lock|audit|bench(?! BENCH_ARGS))", r"make --dry-run \1"),
  (r'^make bench BENCH_ARGS="(.*)"', r'make bench BENCH_ARGS="\1 --list"'),
  (r"^python -m pytest ", "python -m pytest --collect-only -q "),
  # Installing pip takes seconds.
  (r"^python3 -m venv \.venv", "python3 -m venv --without-pip .venv"),
  (r"^tail -f ", "tail "),
  # Benchmarks have flags for their size.
  (r"(benchmarks/convert_table\.py .*)$", r"\1 --rows=2000 --labels=500"),
  (r"(benchmarks/synthetic_1_3m\.py .*)--test_queries=4096", r"\1--test_queries=64 --scale=0.001"),
  (r"(benchmarks\.(?:cost_growth|bench|int8_encoding) .*)$", r"\1 --size=tiny"),
  (r"(benchmarks\.restore_memory .*)$", r"\1 --scale=0.001"),
  (r"(benchmarks\.load_weights)$", r"\1 --layers=1 --vocab_size=1000 --files=2"),
  (r"(benchmarks\.blend_ranking)$", r"\1 --labels=2000 --train_queries=4000 --queries=64"),
  (r"(benchmarks\.predict_host) --queries=200000 --labels=10000", r"\1 --queries=200 --labels=100"),
  (r"(benchmarks\.parity_torch (?!.*--steps).*)$", r"\1 --steps=4"),
  (r"(benchmarks\.predict_processes .*)--queries=1000000", r"\1--queries=300 --batch_size=16"),
  (r"(benchmarks\.scann_recall) --labels=131072(.*) --groups=1000", r"\1 --labels=4096\2 --groups=100"),
  (r"(benchmarks\.small_vectors .*)--groups=10000", r"\1--groups=100 --labels=5000 --dim=64"),
  (r"(benchmarks\.split_table)$", r"\1 --rows=2000"),
  (r"(benchmarks\.export_vectors --folder=\S+)$", r"\1 --labels=500 --dims=8"),
  (r"(benchmarks\.serve_attack .*)--requests=10000", r"\1--requests=100 --clients=4"),
  (r"(benchmarks\.serve_load .*)--seconds=4 --rounds=5", r"\1--seconds=0.3 --rounds=2"),
  (r"--seeds=1,2,3", "--seeds=1"),
  # The grid of mining has 17 runs; this one has a run for each seed.
  (r"((?:vixml study|vixml_jax\.study) )--study=mining (.*)$", r"\1--study=seeds \2 --seeds=2"),
  (r"for study in fusion adapters prompts images;", "for study in prompts;"),
]

PAGES = [path.relative_to(ROOT).as_posix() for path in tracked_pages()]


def _script(block: Block) -> str:
  """Returns what is run for a block of commands."""
  lines = []
  for _, line in shell_lines(block):
    if any(re.match(rf"\s*(?:{pattern})", line) for pattern in NOT_HERE):
      line = ":"
    for pattern, replacement in CHANGED:
      line = re.sub(pattern, replacement, line)
    lines.append(line)
  # A command in the background that fails is noticed.
  return "\n".join([*lines, 'for job in $(jobs -p); do wait "$job"; done'])


def _blocks(page: str) -> list[Block]:
  """Returns the blocks of a page that are run."""
  shells = ("bash", "console")
  blocks = Document.read(ROOT / page).blocks
  return [b for b in blocks if b.language in shells or (b.language == "python" and needs_a_trained_model(b.code))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  from tests.helpers.page_checkout import PageCheckout  # Imports jax and torch, which the other tests do not need.

  return PageCheckout.make(tmp_path_factory.mktemp("pages") / "trained")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and _blocks(page)])
def test_commands_of_the_page_run(page, trained, tmp_path):
  checkout = trained.copy(tmp_path / "checkout")
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = str(free.getsockname()[1])
  try:
    checkout.run(BEFORE.get(page, ":"))
    for block in _blocks(page):
      code = f"python - << 'END'\n{block.code}END" if block.language == "python" else _script(block)
      try:
        checkout.run(code, PORT=port)
      except AssertionError as error:
        raise AssertionError(f"{page}:{block.line}: {error}") from None
  finally:
    checkout.stop_server()


def test_every_row_of_the_tables_is_needed():
  lines = [
    line
    for page in PAGES
    for block in Document.read(ROOT / page).blocks
    if block.language != "python" and page not in ELSEWHERE
    for _, line in shell_lines(block)
  ]
  assert not [pattern for pattern in NOT_HERE if not any(re.match(pattern, line) for line in lines)]
  assert not [pattern for pattern, _ in CHANGED if not any(re.search(pattern, line) for line in lines)]


def test_extras_of_the_pages_exist():
  known = set(re.findall(r"^([\w-]+) =$", (ROOT / "setup.cfg").read_text("utf-8"), re.MULTILINE))
  for page in PAGES:
    named = re.findall(r"'?\.\[([\w,-]+)\]'?", (ROOT / page).read_text("utf-8"))
    assert set(",".join(named).split(",")) - {""} <= known, page
