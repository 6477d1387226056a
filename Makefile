# make demo    serial search, thread trees and what RL teaches them, from scratch, with a report: 10 minutes on 2 cores
# make smollm2 a pretrained model learns to spawn, on two tasks: 5 hours on 2 cores
# make test    the quick tests, 10 minutes on 2 cores
# make lint    ruff and mypy
# make docs    the documentation site, site/index.html
# make wheel   dist/apr_jax-*.whl, for tpu_setup/
#
# All targets make the virtual environment in .venv when it is missing or setup.py has changed, with what they need: tests,
# lint and docs need more packages than a run.
# SCALE, OUT and ARGS go to `apr`: make demo OUT=/data/nano

# For a new environment: the newest Python on the path that starts (a shim may not) and can make one.
# Another one: make clean, make venv PYTHON=python3.11
NEWEST = for name in python3.14 python3.13 python3.12 python3.11; do \
  if $$name -c 'import ensurepip, venv' 2>/dev/null; then echo $$name; break; fi; done
PYTHON ?= $(or $(shell $(NEWEST)),python3)
SCALE  ?= demo
OUT    ?= runs/$(SCALE)
ARGS   ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.installed-dev

# Compiled programs are kept here, so that the second start of anything is quick.
export APR_CACHE ?= $(CURDIR)/.cache/xla
# Memory in large pages: a training step touches fresh memory throughout, 1.1 times as fast this way (docs/training.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help venv demo smollm2 docs wheel test test-all test-tpu lint format figures bench solve clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,10p'

venv: $(TOOLS)

$(STAMP): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "apr_jax needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(TOOLS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/apr reproduce --scale $(SCALE) --out $(OUT) $(ARGS)

# It may be stopped at any time, and goes on from there. In the background: nohup make smollm2 > smollm2.log &
smollm2: SCALE = smollm2
smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[hf,tasks]'
	$(BIN)/python experiments/smollm2.py --out $(OUT) $(ARGS)

wheel: $(STAMP)
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Two processes: what takes time is compiling, on one core. The tests of a file share what they have trained. LLVM doesn't
# optimize, which saves a third of the compiling; `make test-all` proves the same of the code that users run.
# The thorough tests too, as CI does: make test ARGS='-m "not slow"'
test: $(TOOLS)
	XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m pytest -q -m "not slow and not thorough" -n 2 --dist loadfile $(ARGS)

# The slow tests start processes, fill the memory and compare times, so they run one after another.
test-all: $(TOOLS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,hf,launch]'
	$(BIN)/python -m pytest -q -m "not slow and not tpu" -n 2 --dist loadfile $(ARGS)
	$(BIN)/python -m pytest -q -m "slow and not tpu" $(ARGS)

test-tpu: $(TOOLS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,tpu]'
	$(BIN)/python -m pytest -q -m tpu $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tables and numbers of README.md and docs/, from the result files in experiments/.
figures: $(TOOLS)
	$(BIN)/python docs/figures.py $(ARGS)

# The documentation site in site/, from docs/ and the code. Reading it needs no server, searching it does.
docs: $(TOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(BIN)/python -m http.server --directory site"

# Needs a run of scale nano: apr reproduce --scale nano --out runs/nano --only training
NANO ?= runs/nano
bench: $(STAMP)
	$(BIN)/apr bench solver --config experiments/nano.py
	env -u GLIBC_TUNABLES $(BIN)/apr bench train --config experiments/mini.py --checkpoint $(NANO)/apr/rl --problems $(NANO)/data/test.jsonl
	$(BIN)/apr bench rollout --checkpoint $(NANO)/apr/rl --problems $(NANO)/data/test.jsonl

# make solve PROBLEM="54 2 93 34 -> 53", with the model of scale mini that the repository keeps
PROBLEM ?= 54 2 93 34 -> 53
MODEL   ?= experiments/mini/apr-rl.safetensors
solve: $(STAMP)
	$(BIN)/apr solve "$(PROBLEM)" --checkpoint $(MODEL) $(ARGS)

# Runs are left alone: they took time to make.
clean:
	rm -rf $(VENV) .cache site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
