# Two commands: `make demo` shows what reliamq does, `make test` checks all of it.  Both set themselves up.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Compiled code is kept whatever the machine has by itself: the tests start a thousand processes of half a second each.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test lint types imports docs unit soak servers servers-stop format promises bench bench-kafka bench-rabbitmq bench-redis clean

demo: $(VENV)/.installed
	$(BIN)/reliamq prove

test: lint types imports unit docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

# Four processes on however few cores: the tests mostly wait, for disks, kills and deadlines.
unit: $(VENV)/.installed-dev
	$(BIN)/python -m tests.servers run $(BIN)/pytest -q -m "not slow" -n 4 --dist loadgroup

# Long forms: many seeds, a million messages; one table at the end.  By hand, before a release.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.servers run $(BIN)/pytest -v -m slow --timeout 7200

# The servers that the tests run on, kept up between runs.
servers: $(VENV)/.installed-dev
	$(BIN)/python -m tests.servers start

servers-stop: $(VENV)/.installed-dev
	$(BIN)/python -m tests.servers stop

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.embedded

# Beside the bare client and FastStream.
bench-kafka: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[benchmarks]'
	$(BIN)/python -m tests.servers run --only kafka $(BIN)/python -m benchmarks.kafka

bench-rabbitmq: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[benchmarks]'
	$(BIN)/python -m tests.servers run --only rabbitmq $(BIN)/python -m benchmarks.rabbitmq

bench-redis: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[benchmarks]'
	$(BIN)/python -m tests.servers run --only redis $(BIN)/python -m benchmarks.redis

# The index of promises in the docs.
promises: $(VENV)/.installed-dev
	$(BIN)/python -m tests.test_promises

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The stamps depend on pyproject.toml alone, so a second run installs nothing.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "reliamq needs Python 3.11 or newer on the PATH"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed
