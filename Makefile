# Every target makes .venv if it is missing. PYTHON picks the interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test chaos check bench golden clean

demo: .venv/run.stamp
	$(BIN)/unlearn demo

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile

chaos: .venv/dev.stamp
	$(BIN)/python -m pytest -m chaos tests

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/dev.stamp
	$(BIN)/python -m tests.benchmarks.trials
	$(BIN)/python -m tests.benchmarks.rows
	$(BIN)/python -m tests.benchmarks.models
	$(BIN)/python -m tests.benchmarks.scaling
	$(BIN)/python -m tests.benchmarks.arithmetic
	$(BIN)/python -m tests.benchmarks.localization
	$(BIN)/python -m tests.benchmarks.campaigns --models 400

golden: .venv/dev.stamp
	$(BIN)/python -m tests.golden

.venv/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
