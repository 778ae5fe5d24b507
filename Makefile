# panfm: two commands on a fresh machine with Python 3.11+, pip and make:  make demo,  make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo
# Two test processes; each with one thread of its own, since threads that wait for a core are slower than none.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=

# The whole way on synthetic images, ending in demo/leaderboard/index.html.
demo: $(VENV)/.installed
	$(BIN)/panfm demo --out $(DEMO_OUT)

# Every test; makes the environment where it is missing.
test: $(VENV)/.installed-dev
	$(PYTEST) $(PYTEST_ARGS)

# The part that runs in about two minutes.
test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# Formatting, lint, types, layers.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site, readable from the folder site/; a broken link or anchor is an error.
# Not --quiet: warnings that are not shown are not counted by --strict.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# pip, not uv: pip resolves the torch and torchvision that belong together.
$(VENV)/.installed: pyproject.toml predict/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -e ./predict
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -e ./predict
	touch $@

# Not all of dev: the API pages read the sources and import nothing.
$(VENV)/.installed-docs: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.PHONY: demo test test-fast lint docs format clean
