# Everything a contributor runs. `make up` and `make test` are each enough on a fresh machine with Python 3.11+, pip, make and git.
.DEFAULT_GOAL := help
.PHONY: help up test check fix bench reference lock clean
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
# Where this is set, each of the hundreds of Python processes of a run compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
MODEL := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
# What to test: a file, a folder or nothing for all of it.
T ?=
# All of it runs in a process per core, whole files in each; a part runs in one, where a debugger works.
WORKERS := $(if $(strip $(T)),,-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
# More words for pytest, such as ARGS='-x -k signin'.
ARGS ?=

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

up: ## install, fetch the first model, run hub and local server until Ctrl-C
	@python=$$(tools/find_python up) && $$python tools/bootstrap.py run && $$python tools/first_model.py >/dev/null
	@# A model this small may never come to an end by itself, so it has one.
	@exec $(BIN)/corral up --model smollm2:135m=$(MODEL) --parameter "num_predict 1024"

test: ## all checks and tests; `make test T=tests/wire` runs a part
ifeq ($(strip $(T)),)
	@# Some wait for the network while others compute.
	@$(MAKE) --jobs=4 .model check .compat .warm
else
	@$(MAKE) .dev .model
endif
	@$(BIN)/python -m pytest $(WORKERS) $(T) $(ARGS)

check: .dev ## formatting, lint and types
	@$(BIN)/ruff format --check --quiet . || { echo "→ make fix"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

fix: .dev ## format and mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

bench: .dev .model ## the figures of docs/performance.md, as one table and as JSON in bench/results
	@$(BIN)/python -m bench $(ARGS)

reference: .dev ## rewrite docs/reference.md from the code
	@$(BIN)/python tools/make_reference.py --write

lock: .dev ## renew the hash-pinned locks from pyproject.toml and requirements/*.in
	@$(BIN)/python tools/lock.py

clean: ## remove what was built or downloaded here
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: .model
.model:
	@python=$$(tools/find_python) && $$python tools/first_model.py >/dev/null

.PHONY: .compat
.compat: .dev
	@python=$$(tools/find_python) && $$python tools/bootstrap.py compat

# pytest compiles the tests in its own way. Its workers, which start at the same time, would each do all of it.
.PHONY: .warm
.warm: .dev
	@[ -d tests/__pycache__ ] || seen=$$($(BIN)/python -m pytest --collect-only -qq 2>&1) || { echo "$$seen"; exit 1; }

.PHONY: .dev
.dev:
	@python=$$(tools/find_python test) && $$python tools/bootstrap.py dev
