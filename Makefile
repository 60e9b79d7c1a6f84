# Everything a checkout needs, made on demand: python3 3.11 or newer and make are all that must be there.
PYTHON ?= python3
BIN := .venv/bin
SELECT = -m 'not nightly'
# Python compiles the modules that it imports, a quarter of those that are installed, and so must be allowed to keep them.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all types tests quick test-integrations lint docs tutorials picture pictures figures race gpu audit clean

demo: .venv/.demo
	$(BIN)/python -m lab demo

# Lint, types and tests.
test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pip check
	@$(MAKE) --no-print-directory -j 2 types tests  # types take one core for a while, and tests all of them

types: .venv/.installed
	$(BIN)/mypy

tests: .venv/.installed
	$(BIN)/pytest -q -n auto --dist loadgroup --max-worker-restart 0 $(SELECT)

# With the tests marked `nightly`, which repeat in more settings what others test.
test-all:
	@$(MAKE) --no-print-directory test SELECT=

# Lint, types, and the tests that start no process and take no more than half a second: to be run while working.
quick: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto --dist loadgroup -m "not process and not slow and not nightly"

# With the real Lightning, transformers, accelerate, TRL, PEFT, and torchft, which `make test` does without (700 MB, some minutes).
test-integrations: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lightning,hf,torchft]' trl peft
	$(BIN)/pytest -q tests/integrations
	$(BIN)/pytest -q tests/local/test_elastic_workers.py tests/comm/test_network_faults.py
	$(BIN)/pytest -q tests/lab/race/test_race.py -k torchft
	PACKSADDLE_ALL_TUTORIALS=1 $(BIN)/pytest -q tests/docs/test_tutorials.py

lint: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/python -m sphinx -W -n --keep-going -q -c docs . build/docs
	@echo "site: build/docs/index.html"

# The pages of docs/tutorials, from the scripts of examples/tutorials, which it runs (some minutes).
tutorials: .venv/.installed
	$(BIN)/python -m lab.docs.tutorials

# The picture of docs/architecture.md, from the imports in the code.
picture: .venv/.installed
	$(BIN)/python -m lab.docs.architecture

# The pictures of ideas in docs/pictures, light and dark.
pictures: .venv/.installed
	$(BIN)/python -m lab.docs.pictures

# The paper's figures, Table 1 and further studies at their smallest scale, a new folder under runs/ for each: do the
# commands of their cards run? MNIST and CIFAR10 are folders of data; without one its studies are left out.
figures: .venv/.installed
	@set -e; study() { echo "$$@"; $(BIN)/python -m lab.paper."$$@" --scale smoke; }; \
	study language; study language variants; study table1; \
	if [ -n "$(MNIST)" ]; then for what in figure2 open compressors k escape; do study figure2 $$what --data-dir "$(MNIST)"; done; fi; \
	if [ -n "$(CIFAR10)" ]; then for what in figure1 norms compressors; do study figure1 $$what --data-dir "$(CIFAR10)"; done; fi

# The tables of the committed race, from its rows.
race: .venv/.installed
	$(BIN)/python -m lab.race tables

# Tests, times and runs that need a GPU (at most nine minutes, no network); writes gpu.json. TORCH: a venv's python with CUDA.
gpu:
	$(or $(TORCH),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))) -m lab.bench.gpu --out gpu.json

# Known vulnerabilities of what is installed, in an environment of its own; asks pypi.org. Offline: pip check alone.
audit: .venv/.installed
	$(BIN)/python -m pip check
	test -x .venv-audit/bin/pip-audit || \
		($(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit) || \
		(echo "audit: pip-audit cannot be installed; is the package index reachable?" >&2; exit 1)
	@.venv-audit/bin/python -c 'import urllib.request as u; u.urlopen("https://pypi.org/pypi/pip/json", timeout=20)' 2>/dev/null || \
		(echo "audit: the vulnerability service (pypi.org) cannot be reached, so nothing was audited" >&2; exit 1)
	$(BIN)/python -m pip freeze --exclude-editable > build-audit.txt
	.venv-audit/bin/pip-audit --requirement build-audit.txt --no-deps --disable-pip

# What the demo needs, and all that developers need. pip prints what it installs.
.venv/.demo: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[fast,lab]'
	touch $@

.venv/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[fast,lab,dev]'
	touch .venv/.demo $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "packsaddle needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .venv-audit build-audit.txt runs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
