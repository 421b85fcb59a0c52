# Everything sets itself up: `make demo`, `make test`. Needs Python 3.11 or newer, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
# Optimum's ONNX half needs an older transformers, so it has an environment and a lock of its own.
OPTIMUM := .venv-optimum
OPTIMUM_STAMP := $(OPTIMUM)/.installed-$(shell cat requirements-optimum.lock pyproject.toml | cksum | cut -d' ' -f1)
OPTIMUM_NEEDS := '.[optimum,onnx,bitsandbytes,plots,energy,peft]' onnxscript sentence-transformers pytest pytest-xdist
NODE := .node
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

tests_named = $(foreach name,$(1),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

# Tests that tell whether transformers 4.57 does as 5 does.
EITHER := $(call tests_named,backends surgery prune_reload student training)

# Tests whose expectations a processor's arithmetic could decide.
NUMERICAL := $(call tests_named,aware budget criteria decoders export families gram learned lora losses low_rank hidden_dimensions masks obs \
	onnx_int8 onnx_small qlora quantize sensitivity sparsity student surgery torch_int8 training tuning)
# Vector units turned down, as far as the libraries let one; on Arm these have no meaning and are left out.
PLAIN_X86 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE \
	OPENBLAS_CORETYPE=Nehalem
PLAIN := $(if $(filter x86_64,$(shell uname -m)),$(PLAIN_X86))

.PHONY: help setup demo test lint unit test-portable test-optimum test-clients soak test-slow bench lock docs cards clean

help:  ## What there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## The virtual environment, from the lock; a second call installs nothing.

$(STAMP): requirements.lock pyproject.toml
	$(call install,$(VENV),requirements.lock,'.[dev]')

$(OPTIMUM_STAMP): requirements-optimum.lock pyproject.toml
	$(call install,$(OPTIMUM),requirements-optimum.lock,$(OPTIMUM_NEEDS))

define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --constraint $(2) torch hatchling editables
	$(1)/bin/pip install --quiet --constraint $(2) --no-build-isolation --editable $(3)
	rm -f $(1)/.installed-* && touch $@
endef

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

test-portable: $(STAMP)  ## The numerical tests as on another processor: fewer vector units, results rounded in another way.
	$(PLAIN) HFCOMPRESS_TEST_KERNELS=other OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(NUMERICAL)

test-optimum: $(OPTIMUM_STAMP)  ## Optimum's tests, and some of the quick ones, on the transformers that it needs.
	OMP_NUM_THREADS=1 $(OPTIMUM)/bin/pytest -n 2 --dist loadfile tests/optimum $(EITHER)

# The install scripts are left out: they fetch onnxruntime's part for GPUs.
test-clients: $(STAMP)  ## Transformers.js on directories that hfcompress writes; needs Node and npm.
	npm install --prefix $(NODE) --ignore-scripts --no-save --no-audit --no-fund @huggingface/transformers@4.3.2
	NODE_PATH=$(abspath $(NODE))/node_modules $(BIN)/pytest -m 'slow or not slow' tests/onnx/test_clients.py

soak: $(STAMP)  ## Kills, full disks, two runs at once, fuzzed input: everything that may befall a run, in about 40 minutes.
	$(BIN)/python -m tests.soak --write docs/reliability.md

test-slow: $(STAMP)  ## The tests that take longer.
	$(BIN)/pytest -m slow

bench: $(STAMP) $(OPTIMUM_STAMP)  ## The benchmarks, each ending in a ratio.
	for file in $(filter-out %/optimum_onnx.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file --quick || exit 1; done
	$(OPTIMUM)/bin/python benchmarks/optimum_onnx.py --quick

cards: $(STAMP)  ## The cards in model_cards/, from the reports beside them.
	$(BIN)/python scripts/cards.py

docs: $(STAMP)  ## The recipe reference, from the schema.
	$(BIN)/python scripts/reference.py docs/recipes.md

lock:  ## Resolve both locks anew, each in an environment of its own.
	$(call resolve,requirements.lock,'.[dev]')
	$(call resolve,requirements-optimum.lock,$(OPTIMUM_NEEDS))

define resolve
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0 hatchling editables
	.venv-lock/bin/pip install --quiet --no-build-isolation $(2)
	.venv-lock/bin/pip freeze --exclude hfcompress | sed 's/+cpu$$//' > $(1)
	rm -rf .venv-lock
endef

clean:  ## Remove the environment and what was built; runs/ stays.
	rm -rf $(VENV) $(OPTIMUM) $(NODE) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
