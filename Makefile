# Everything sets itself up: `make demo`, `make test`. Needs Python 3.11 or newer, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test lint unit test-slow bench lock docs clean

help:  ## What there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## The virtual environment, from the lock; a second call installs nothing.

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock torch hatchling editables
	$(BIN)/pip install --quiet --constraint requirements.lock --no-build-isolation --editable '.[dev]'
	rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP)  ## Distil, prune, quantize and measure a small model, offline, in a few minutes.
	HF_HUB_OFFLINE=1 $(BIN)/hfcompress run recipes/quickstart.yaml

test: lint unit  ## Linters, types, import rule and the quick tests.

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## The tests that take longer.
	$(BIN)/pytest -m slow

bench: $(STAMP)  ## The benchmarks, each ending in a ratio.
	for file in benchmarks/*.py; do $(BIN)/python $$file --quick || exit 1; done

docs: $(STAMP)  ## The recipe reference, from the schema.
	$(BIN)/python scripts/reference.py docs/recipes.md

lock:  ## Resolve the lock anew, in an environment of its own.
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0 hatchling editables
	.venv-lock/bin/pip install --quiet --no-build-isolation '.[dev]'
	.venv-lock/bin/pip freeze --exclude hfcompress | sed 's/+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean:  ## Remove the environment and what was built; runs/ stays.
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
