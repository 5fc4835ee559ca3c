# Everything a newcomer needs is Python 3.11 with venv, a C++ compiler for llama.cpp, and make.
#
#   make demo    see the cache at work, on a small real model
#   make test    what must pass before a change is accepted
#   make fast    the same without a model
#   make long    what takes half an hour: random crashes, property runs and soaks
#   make fuzz    foreign bytes into every reader, five minutes; SECONDS=3600 takes longer
#   make bench   erllama beside others, and its own figures: an hour, piece by piece, goes on where
#                it was interrupted; tables and plots in bench/results
#   make bench-grammar  decoding under a JSON grammar, beside decoding without one
#   make bench-serving  many requests at once, beside a bare loop and llama-server
#   make bench-cache    the cache's figures beside their targets; TRACE=file replays another trace
#   make bench-snapshots  what snapshots cost a prefill, for models whose state cannot be cut
#   make torture  break it on purpose for ten minutes; ARGS="--only kill --seconds 600" says what
#   make docs    the documentation as a site, in site/
#
# Each sets .venv up first; make PYTHON=python3.12 chooses the interpreter it is made with.

PYTHON ?= python3
BIN := .venv/bin

PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
empty :=
space := $(empty) $(empty)
# Where mypy finds the plugins' packages, and the modules that tests share.
export MYPYPATH := $(subst $(space),:,$(strip $(PLUGINS) tests bench fuzz))

# A pytest process for each core; one that has no tests left takes some of another's.
EVERY_CORE := -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test fast long fuzz bench bench-cache bench-grammar bench-serving \
        bench-snapshots torture docs lint types clean

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "erllama needs Python 3.11 or newer, and '$(PYTHON)' is not." \
	         "Name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) scripts/environment.py

demo: setup
	@$(BIN)/erllama demo

test: lint types
	$(BIN)/pytest $(EVERY_CORE) -m "not (crash or fuzz or soak)"

fast: lint types
	$(BIN)/pytest $(EVERY_CORE) -m "not (crash or fuzz or soak or real_model or packaging)"

long: setup
	$(BIN)/pytest -m "crash or fuzz or soak"

# Coverage guides it where atheris has a wheel; elsewhere it is told so, and goes on without.
fuzz: setup
	-@$(BIN)/python -c 'import atheris' 2> /dev/null || $(BIN)/python -m pip install --quiet \
	    --disable-pip-version-check --only-binary atheris 'atheris>=3'
	$(BIN)/python fuzz/driver.py --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED)) $(TARGETS)

# Without a peer the benchmarks say that it is missing, and measure the rest.
bench: setup
	-@$(MAKE) .venv-peers/.ready
	$(BIN)/python bench/everything.py

bench-serving: setup
	-@$(MAKE) .venv-peers/.ready
	$(BIN)/python bench/serving.py

.venv-peers/.ready: bench/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r bench/peers.txt
	@touch $@

bench-grammar: setup
	$(BIN)/python bench/grammar.py

bench-cache: setup
	$(BIN)/python bench/cache.py $(if $(TRACE),--trace $(TRACE))

bench-snapshots: setup
	$(BIN)/python bench/snapshots.py

torture: setup
	$(BIN)/python -m torture $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "erllama: see site/index.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tests of one plugin at a time: each folder has its own conftest module.
types: setup
	$(BIN)/mypy erllama_core $(foreach p,$(PLUGINS),$(p)/erllama_$(notdir $(p))) \
	    $(wildcard conftest.py scripts tests examples bench fuzz torture)
	@set -e; for plugin in $(PLUGINS); do \
	    test ! -d $$plugin/tests || $(BIN)/mypy $$plugin/tests; done

clean:
	rm -rf .venv .torture site .mypy_cache .pytest_cache .ruff_cache .hypothesis
