# The commands a newcomer needs: make demo, make test. Everything runs from .venv, which `make setup` builds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# files of tests at a time: a rank has one thread and waits for others much of the time
WORKERS ?= 2
# pip compiles .pyc files while it installs; never let a caller's setting turn that into 10 s per process later
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup test lint demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-ci.txt -e ".[test]"
	touch $(STAMP)

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(STAMP)
	$(BIN)/python -m tools.demo --output out/demo

clean:
	rm -rf $(VENV) out dist build
