# One target per thing that a developer or a new user does.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := zoo tests

.PHONY: demo readme install install-dev test test-fast check lint types contracts format notebook clean

# pip runs only where the pins or the project's own list have changed since the last time.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/.installed

install-dev: .venv/.installed-dev

demo: install            ## the main job on embedded data: all recipes of the quickstart, table and figures
	$(BIN)/zoo bench quickstart --offline

test: install-dev        ## all tests, slow ones too
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: install-dev   ## the tests that take less than two seconds each, within three minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

check: lint types contracts test

lint: install-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: install-dev
	$(BIN)/mypy

contracts: install-dev
	$(BIN)/lint-imports

format: install-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

notebook: install-dev    ## run the notebook top to bottom
	$(BIN)/jupyter-execute lung_cancer_image_classification.ipynb

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

readme: install-dev      ## write the committed results into the README's tables
	ZOO_UPDATE_README=1 $(BIN)/python -m pytest -q tests/test_readme.py
