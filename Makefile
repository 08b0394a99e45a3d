# Aliases only; README.md shows the commands behind them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-editing demo-generalization demo-optimizer test test-slow coverage lint types docs

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/scalegmn demo

demo-editing: setup
	$(BIN)/scalegmn demo editing

demo-generalization: setup
	$(BIN)/scalegmn demo generalization

demo-optimizer: setup
	$(BIN)/scalegmn demo optimizer

bundles/%: .venv/installed
	$(BIN)/scalegmn demo $* --out runs/$@
	$(BIN)/scalegmn export --checkpoint runs/$@ --out $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" --cov --cov-report=term

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
