# Each target sets up whatever it needs; nothing has to be installed beforehand but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
MARK := not long
# Without compiled modules each start of Python would spend seconds on compiling them again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long check format docs bench-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## the environment in .venv, versions from constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("counterstain needs Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP) ## phantom -> study -> report, some eight minutes on two cores
	$(BIN)/counterstain demo --out out/demo

test: $(STAMP) ## the tests
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "$(MARK)"

test-long: $(STAMP) ## the tests that take minutes each: studies killed twenty times, clusters that lose a node
	$(BIN)/python -m pytest -m long

check: $(STAMP) ## lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## the documentation site in out/site; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "out/site/index.html; with search: $(BIN)/python -m http.server --directory out/site --bind 127.0.0.1"

bench-gpu: $(STAMP) ## every network timed on this GPU, in training and drawing: out/gpu/gpu.md
	$(BIN)/python benchmarks/gpu.py --out out/gpu

clean: ## remove the environment (results in out/ stay)
	rm -rf $(VENV) build
