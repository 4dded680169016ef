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

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

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
