PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: setup system-deps quickstart test lint drills bench help

help:  ## What there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/'

setup:  ## A virtual environment with everything, pinned
	@$(PYTHON) .ci/make_venv.py $(VENV) --torch-index "$(TORCH_INDEX)"

system-deps:  ## For the tests: Chromium and its driver, Slurm and munge, from Debian's packages
	@$(SUDO) apt-get update -qq
	@$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver slurm-wlm munge

quickstart: setup  ## Collect text, train a tokenizer and a small model, evaluate, report
	@$(BIN)/duet quickstart

test: setup  ## All tests
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: setup  ## Style, format and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy .

drills: setup  ## Long proofs
	@$(BIN)/python -m pytest -m drill

bench: setup  ## Measure what is claimed about speed; ONLY="NAME…" for some of it
	@$(BIN)/python benchmarks $(if $(ONLY),--only $(ONLY))
