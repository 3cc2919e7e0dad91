# exitax: `make` alone lists the targets.
#
#   PYTHON=python3.12    the interpreter .venv is built with (default: your python3 where it is 3.11 to 3.13,
#                        otherwise the newest of python3.13, python3.12, python3.11)
#   VENV=.venv           where the environment lives
#   ARGS='-k decode'     passed on by quickstart, test and bench
#   WORKERS=2            processes the tests run in (default: as many as there are cores, 4 at most)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PYTHON ?=
WORKERS ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# An install is done again when what it was asked for changes, and only then.
digest = $(shell cat pyproject.toml $(1) | cksum | tr -dc '0-9')
CORE_STAMP := $(VENV)/.installed-$(call digest,requirements.txt)
DEV_STAMP := $(VENV)/.installed-dev-$(call digest,requirements.txt requirements-dev.txt)

.PHONY: help install install-dev quickstart test lint format docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@awk 'NR > 2 && /^#   / { print substr($$0, 3) } !/^#/ { exit }' $(firstword $(MAKEFILE_LIST))

install: $(CORE_STAMP) ## build .venv and install what the commands need

install-dev: $(DEV_STAMP) ## the same, with all that tests, benchmarks and tools import

quickstart: $(CORE_STAMP) ## train a small early-exit model on real text, evaluate it, generate with it
	@$(BIN)/exitax quickstart --model_dir=runs/quickstart $(ARGS)

test: $(DEV_STAMP) ## run the tests (ARGS='-k name' picks some)
	@workers='$(WORKERS)'; $(BIN)/python -m pytest -q -n "$${workers:-auto}" --maxprocesses=$${workers:-4} \
	  --dist=loadscope --no-loadscope-reorder $(ARGS)

lint: $(DEV_STAMP) ## ruff, pyright, codespell
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV_STAMP) ## format and mend what ruff can
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format .

docs: $(DEV_STAMP) ## build the documentation into site/
	@$(BIN)/mkdocs build -q --strict && echo 'built site/index.html'

bench: $(DEV_STAMP) ## run every benchmark in its short form
	@for program in benchmarks/[a-z]*.py; do \
	  echo "== $$program"; $(BIN)/python "$$program" --quick $(ARGS); \
	done

clean: ## remove .venv, caches and built documentation (runs/ stays)
	@rm -rf '$(VENV)' .cache site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python=''; \
	for candidate in $(if $(PYTHON),'$(PYTHON)',python3 python3.13 python3.12 python3.11 python); do \
	  if "$$candidate" -c '$(SUITABLE)' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  found="$$( $(or $(PYTHON),python3) --version 2>&1 || true)"; \
	  echo "exitax needs Python 3.11, 3.12 or 3.13, and found: $${found:-none}." >&2; \
	  echo "Install one, or name it: make $(or $(firstword $(MAKECMDGOALS)),install) PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi; \
	echo "building $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv '$(VENV)'

$(CORE_STAMP): | $(BIN)/python
	@echo 'installing exitax and what it needs (about 800 MB with jax; half a minute on a fast line)'
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps -e .
	@rm -f $(VENV)/.installed-[0-9]* && touch $@

$(DEV_STAMP): $(CORE_STAMP)
	@echo 'installing what tests, benchmarks and tools need'
	@$(PIP) install -r requirements-dev.txt
	@$(BIN)/python -c 'import importlib.util as u; u.find_spec("torch") or print("torch was left to you here (Linux with Python 3.12 or newer gets a CUDA build of gigabytes): $(BIN)/pip install torch, for what compares with it")'
	@rm -f $(VENV)/.installed-dev-* && touch $@
