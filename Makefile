PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin

.PHONY: setup quickstart test lint drills help

help:  ## What there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/'

setup:  ## A virtual environment with everything, pinned
	@$(PYTHON) .ci/make_venv.py $(VENV) --torch-index "$(TORCH_INDEX)"

quickstart: setup  ## Collect text, train a tokenizer and a small model, evaluate, report
	@$(BIN)/duet quickstart

test: setup  ## All tests
	@$(BIN)/python -m pytest

lint: setup  ## Style, format and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy .

drills: setup  ## Long proofs
	@$(BIN)/python -m pytest -m drill
