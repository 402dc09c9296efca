# Uses the active virtual environment; without one it makes .venv here.
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := $(CURDIR)/.venv
endif
PYTHON ?= python3.11
SEED ?= 0
BIN := $(VENV)/bin
STAMP := $(VENV)/.agentloop-installed
export AGENTLOOP_HARBOR := $(VENV)/harbor

.PHONY: install quickstart test test-all lint bench clean

install: $(STAMP)

# torch first: the CPU build of constraints/cpu.txt; otherwise pip may bring gigabytes of CUDA.
$(STAMP): pyproject.toml constraints/cpu.txt constraints/inspect.txt constraints/harbor.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r constraints/inspect.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --ignore-requires-python --target $(AGENTLOOP_HARBOR) -r constraints/harbor.txt
	touch $(STAMP)

quickstart: install
	$(BIN)/python -m examples.quickstart.run --seed $(SEED) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install lint
	$(BIN)/python -m pytest -q -m 'not slow and not gpu'

test-all: install lint
	$(BIN)/python -m pytest -q -m 'not gpu'

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
