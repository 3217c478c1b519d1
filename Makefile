# Each target sets up what it needs. PYTHON chooses the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench faults llamacpp clean

help:            ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:[^#]*##/ —/'

demo: .venv/ready  ## train a small model on this machine's CPU and talk to it (about 10 minutes; STAGES=all: half an hour)
	$(BIN)/python -m minimind.demo --stages=$(or $(STAGES),base)

test: .venv/ready-dev  ## run the test suite
	$(BIN)/python -m pytest

lint: .venv/ready-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready-dev  ## build the documentation in Chinese and English: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -f mkdocs.en.yml

bench: .venv/ready-dev  ## speed: training beside the original's recipe, stages beside TRL, generation beside transformers
	$(BIN)/python -m benchmarks.train_speed
	$(BIN)/python -m benchmarks.stage_peers
	$(BIN)/python -m benchmarks.generation_speed

faults: .venv/ready-dev  ## kill, stop, starve and damage small trainings, and compare what comes out (about a quarter of an hour)
	$(BIN)/python -m faults

llamacpp:        ## install llama.cpp (npm's node-llama-cpp, for the CPU) for the tests of GGUF files, which skip without it
	cd tests/llama_cpp && npm install --omit=optional --ignore-scripts --no-audit --no-fund

clean:           ## remove what make has installed (weights and data stay)
	rm -rf .venv tests/llama_cpp/node_modules

# Exactly the versions of constraints.txt, so that a machine gets today what it got when they were tested.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MiniMind needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
