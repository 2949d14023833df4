# `make demo` and `make test` are all there is to set up: each makes the virtual environment it needs. Another Python:
# `make test PYTHON=python3.13 VENV=.venv-3.13`.
# Anywhere without make, the pip lines in README.md do the same.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

.PHONY: demo lint test fast-test lowest-test site bench bench-all plans examples notebook release-check format clean

demo: $(VENV)/demo.installed
	$(BIN)/flax-vit demo

# A file's tests run in one process, what they share is made once; but for what the last process to end gives away.
PYTEST := pytest --numprocesses auto --dist worksteal --durations 25

test: lint
	$(BIN)/$(PYTEST)

# Annotations are checked by `make test`; without that a test takes four fifths of the time.
# `make fast-test TESTS=parity_tests/models` is one room's.
fast-test: lint
	JAXTYPING_DISABLE=1 $(BIN)/$(PYTEST) -m 'not slow and not releases' $(TESTS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lowest versions that pyproject.toml admits; these files use each of them. What releases of then and now call
# deprecated in each other is no concern of ours.
USING_ALL := $(patsubst %,parity_tests/%.py,files/test_damage folders/test_hub folders/test_pretrained \
	models/test_nnx models/test_serving models/test_stacking project/test_finetune project/test_notebook \
	project/test_package project/test_site proof/test_report)
lowest-test: $(LOWEST)/installed
	$(LOWEST)/bin/$(PYTEST) -m 'not slow' -W ignore::DeprecationWarning $(USING_ALL)

# docs/ as a site, in build/site. Strict: whatever leads nowhere is an error. What its theme says of its successors is not
# about this project.
site: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The cases of docs/performance.md that tell most, kept as this processor's: about 10 minutes on two idle cores.
# torch.compile needs a C++ compiler and Python's headers.
BENCHED := $(VENV)/test.installed $(if $(shell command -v nvidia-smi 2>/dev/null),$(VENV)/gpu.installed)
bench: $(BENCHED)
	$(BIN)/python benchmarks/speed.py --record

# All that docs/performance.md shows: an hour and a half.
bench-all: $(BENCHED)
	mkdir -p build
	$(BIN)/python benchmarks/speed.py --all --record --picture build/speed.png
	$(BIN)/python benchmarks/scaling.py --json build/scaling.json --picture build/scaling.png
	$(BIN)/python benchmarks/conversion.py --record
	$(BIN)/python benchmarks/startup.py --record
	$(BIN)/python benchmarks/parts.py --record

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

# examples/quickstart.ipynb anew, of quickstart.py, with its outputs: a minute.
notebook: $(VENV)/test.installed
	$(BIN)/python -m parity_tests.support.notebook

# All of a release but the upload, in two fresh environments with PyTorch. TAG=v0.2.0: what is to be released.
release-check: $(VENV)/test.installed
	$(BIN)/python -m parity_tests.project.release_check $(TAG)

format: $(VENV)/test.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST)

$(VENV)/%.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

# pip takes the newest versions, uv can take the lowest.
$(LOWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable '.[test]'
	touch $@
