# `make demo` and `make test` are all there is to set up: each makes the virtual environment it needs.
# Anywhere without make, the pip lines in README.md do the same.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test fast-test format clean

demo: $(VENV)/demo.installed
	$(BIN)/flax-vit demo

test: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto

fast-test: $(VENV)/test.installed
	$(BIN)/pytest --numprocesses auto -m 'not slow and not releases'

format: $(VENV)/test.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/%.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
