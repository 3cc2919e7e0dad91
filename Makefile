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
# -qq: errors only. Not compiled at once: Python compiles what it imports, which is a fraction.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
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
	@echo '$(VENV) is ready: try $(BIN)/exitax --help, or make quickstart'

install-dev: $(DEV_STAMP) ## the same, with all that tests, benchmarks and tools import
	@echo '$(VENV) is ready: try make test, make lint or make bench'

quickstart: $(CORE_STAMP) ## train a small early-exit model on real text, evaluate it, generate with it
	@$(BIN)/exitax quickstart --model_dir=runs/quickstart $(ARGS)

test: $(DEV_STAMP) ## run the tests (ARGS='-k name' picks some)
	@workers='$(WORKERS)'; $(BIN)/python -m pytest -q -n "$${workers:-auto}" --maxprocesses=$${workers:-4} \
	  --dist=loadscope --no-loadscope-reorder $(ARGS) || { \
	    status=$$?; [ $$status = 5 ] && echo "no test matches ARGS" >&2; exit $$status; }

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

# The stamp comes last, so that an interrupted build is started again.
$(VENV)/.built:
	@python=''; \
	for candidate in $(if $(PYTHON),'$(PYTHON)',python3 python3.13 python3.12 python3.11 python); do \
	  if "$$candidate" -c '$(SUITABLE)' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  found="$$('$(or $(PYTHON),python3)' --version 2>/dev/null || true)"; \
	  echo "exitax needs Python 3.11, 3.12 or 3.13, and found: $${found:-none}." >&2; \
	  echo "Install one, or name it: make $(or $(firstword $(MAKECMDGOALS)),install) PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi; \
	echo "building $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv '$(VENV)'; \
	touch $@

# Asked for one Python while .venv holds another: say so rather than use the wrong one.
.PHONY: same-python
same-python: | $(VENV)/.built
	@wanted="$$('$(PYTHON)' --version)"; held="$$($(BIN)/python --version)"; \
	if [ "$$wanted" != "$$held" ]; then \
	  echo "$(VENV) holds $$held, not $$wanted: add VENV=.venv-other, or remove it with make clean." >&2; \
	  exit 2; \
	fi

$(CORE_STAMP): | $(VENV)/.built $(if $(PYTHON),same-python)
	@echo 'installing exitax and what it needs (about 1 GB, most of it jax; a minute on a fast line)'
	@$(PIP) install --no-compile -r requirements.txt
	@$(PIP) install --no-compile --no-deps -e .
	@rm -f $(VENV)/.installed-* && touch $@

$(DEV_STAMP): $(CORE_STAMP)
	@echo 'installing what tests, benchmarks and tools need'
	@$(PIP) install --no-compile -r requirements-dev.txt
	@$(BIN)/python -c "$$TORCH_NOTE"
	@rm -f $(VENV)/.installed-dev-* && touch $@

define TORCH_NOTE
import importlib.util
if importlib.util.find_spec('torch') is None:
  print('torch was left to you: on Linux with Python 3.12 or newer its usual build brings gigabytes of CUDA.')
  print('What compares with it needs: $(BIN)/pip install torch')
endef
export TORCH_NOTE
