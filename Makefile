# Everything a contributor runs. `make up` and `make test` are each enough on a fresh machine with Python 3.11+, pip, make and git.
.DEFAULT_GOAL := help
.PHONY: help up test check fix bench reference lock clean
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

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

test: .dev ## all checks and tests; `make test T=tests/wire` runs a part
ifeq ($(strip $(T)),)
	@# One of these waits for the network while the other computes.
	@$(MAKE) --jobs=2 check .fetched
else
	@python=$$(tools/find_python) && $$python tools/first_model.py >/dev/null
endif
	@$(BIN)/python -m pytest $(WORKERS) $(T) $(ARGS)

check: .dev ## formatting, lint and types
	@$(BIN)/ruff format --check --quiet . || { echo "→ make fix"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

fix: .dev ## format and mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

bench: .dev ## the figures of docs/performance.md, as one table and as JSON in bench/results
	@python=$$(tools/find_python) && $$python tools/first_model.py >/dev/null
	@$(BIN)/python -m bench $(ARGS)

reference: .dev ## rewrite docs/reference.md from the code
	@$(BIN)/python tools/make_reference.py --write

lock: .dev ## renew the hash-pinned locks from pyproject.toml and requirements/*.in
	@$(BIN)/python tools/lock.py

clean: ## remove what was built or downloaded here
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: .fetched
.fetched:
	@python=$$(tools/find_python) && $$python tools/first_model.py >/dev/null && $$python tools/bootstrap.py compat

.PHONY: .dev
.dev:
	@python=$$(tools/find_python test) && $$python tools/bootstrap.py dev
