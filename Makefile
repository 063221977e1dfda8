# Every target sets up what it needs: a virtual environment in .venv, installed once for each change of the two files below.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint unit slow docs clean
.DEFAULT_GOAL := test

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## train a backdoored classifier on the bundled digits, then find and remove the backdoor
	$(BIN)/debackdoor demo

test: lint unit  ## everything CI checks

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: $(VENV)/installed
	$(BIN)/python -m pytest

slow: $(VENV)/installed  ## the tests that train or measure for minutes
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/installed  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) dist build site .mypy_cache .pytest_cache .ruff_cache
