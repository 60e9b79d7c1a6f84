# Everything a checkout needs, made on demand: python3 3.11 or newer and make are all that must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-integrations lint docs clean

demo: .venv/.installed
	$(BIN)/packsaddle demo

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto --dist loadgroup

# With the real Lightning, transformers, accelerate and trackers, which `make test` does without (700 MB, some minutes).
test-integrations: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lightning,hf,track]'
	$(BIN)/pytest -q tests/test_integrations.py tests/test_trackers.py

lint: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/python -m sphinx -W -n --keep-going -q -c docs . build/docs
	@echo "site: build/docs/index.html"

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "packsaddle needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
