# Aliases only; README.md shows the commands behind them.
PYTHON ?= python3
BIN := .venv/bin
TIME := $(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo demo-editing demo-generalization test test-slow coverage lint types docs

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m scalegmn.zoos --conf configs/zoos/digits_inr.yml
	$(BIN)/python inr_classification.py --conf configs/digits_cls/scalegmn.yml --run_dir runs/demo/$(TIME)
	$(BIN)/python benchmarks/flat_baselines.py runs/demo/$(TIME)

demo-editing: setup
	$(BIN)/python -m scalegmn.zoos --conf configs/zoos/digits_inr.yml
	$(BIN)/python inr_editing.py --conf configs/digits_editing/scalegmn_bidir.yml --run_dir runs/demo-editing/$(TIME)

demo-generalization: setup
	$(BIN)/python -m scalegmn.zoos.cnns --conf configs/zoos/digits_cnn.yml
	$(BIN)/python predicting_generalization.py --conf configs/digits_cnn/scalegmn_hetero.yml --run_dir runs/demo-generalization/$(TIME)
	$(BIN)/python benchmarks/statistics_baseline.py runs/demo-generalization/$(TIME)

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
