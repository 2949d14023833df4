# `make demo` and `make test` are all there is to set up: each makes the virtual environment it needs. Another Python:
# `make test PYTHON=python3.13 VENV=.venv-3.13`.
# Anywhere without make, the pip lines in README.md do the same.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo lint test fast-test lowest-test bench plans examples format clean

demo: $(VENV)/demo.installed
	$(BIN)/flax-vit demo

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses auto --durations 25

fast-test: $(VENV)/test.installed
	$(BIN)/pytest --numprocesses auto --durations 10 -m 'not slow and not releases'

# The lowest versions that pyproject.toml admits, in an environment of their own; they may deprecate what newer ones lack.
LOWEST_TESTS := $(addprefix parity_tests/test_, models.py pretrained.py hub.py serving.py nnx.py outputs.py package.py)
lowest-test:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip uv
	.venv-lowest/bin/uv pip compile --quiet --python .venv-lowest/bin/python --resolution lowest-direct --extra test \
		--no-annotate pyproject.toml --output-file .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --requirement .venv-lowest/requirements.txt --editable .
	.venv-lowest/bin/pytest --numprocesses auto -W default::DeprecationWarning -m 'not slow and not releases' $(LOWEST_TESTS)

# What README.md and docs/performance.md show: about an hour on two idle cores.
bench: $(VENV)/test.installed $(if $(shell command -v nvidia-smi 2>/dev/null),$(VENV)/gpu.installed)
	mkdir -p build
	$(BIN)/python benchmarks/speed.py --json build/speed.json --picture build/speed.png
	$(BIN)/python benchmarks/scaling.py --json build/scaling.json --picture build/scaling.png
	$(BIN)/python benchmarks/conversion.py --json build/conversion.json
	$(BIN)/python benchmarks/startup.py --json build/startup.json

# Memory and compile time on accelerators, in docs/performance.md. None is needed: their compilers are fetched (350 MB).
plans: $(VENV)/test.installed
	mkdir -p build
	$(BIN)/python benchmarks/scaling.py --target 'NVIDIA H100' --json build/h100.json
	$(BIN)/python benchmarks/scaling.py --target 'TPU v5e' --json build/v5e.json

# The figures of docs/finetuning.md and docs/attention.md: trainings of some minutes. What is finished is not run again.
examples: $(VENV)/examples.installed
	mkdir -p build
	$(BIN)/python examples/finetune/finetune.py build/finetune --start converted --start scratch
	$(BIN)/python examples/attention_collapse/collapse.py build/collapse

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
