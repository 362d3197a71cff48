# Everything a newcomer needs; each target sets up .venv by itself. No GPU and no network beyond the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/gpt_python.yaml
RANKS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: train test test-all test-slow texts lint docs pictures bench gpu-check clean help

train: $(VENV)/.ready   ## train two stages of a byte GPT on real text, about 3 minutes on 2 cores
	$(BIN)/dpp train $(CONFIG) --ranks $(RANKS) --overwrite

test: $(VENV)/.ready    ## the tests, without the slow ones: about 5 minutes on 2 cores
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.ready    ## all tests: about 10 minutes on 2 cores
	$(PYTEST)

test-slow: $(VENV)/.ready   ## what `make test` leaves out
	$(PYTEST) -m slow

texts: $(VENV)/.ready   ## write the texts of all faults anew, for a look at what users read
	rm -f tests/fault_texts.json
	$(BIN)/python -m pytest --update-texts

lint: $(VENV)/.ready    ## style, layers, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy -p decoupled_pp -p benchmarks

docs: $(VENV)/.ready    ## regenerate the configuration reference
	$(BIN)/python -m decoupled_pp.settings.reference > docs/configuration.md

pictures: $(VENV)/.ready   ## draw the README's picture again
	$(BIN)/python docs/pictures/draw_idea.py > docs/pictures/idea.svg

bench: $(VENV)/.ready   ## share of ideal with emulated compute, 2, 4 and 8 ranks
	for ranks in 2 4 8; do $(BIN)/dpp bench schedule --ranks $$ranks; done

gpu-check: $(VENV)/.ready   ## GPU tests and the one-GPU benchmark; says so and ends well where there is no GPU
	$(BIN)/python -m pytest tests/gpu -rs
	$(BIN)/dpp bench gpu

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "decoupled_pp needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:   ## remove .venv, all runs and caches
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

help:   ## list the targets
	@awk -F ':.*## *' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
