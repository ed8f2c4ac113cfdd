# Every target sets up what it needs. PYTHON chooses the interpreter, VENV the folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
OUT ?= out

# Nothing is compiled ahead, so what is imported has to be kept compiled, whatever the caller's shell
# says: torch alone takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-dev demo federation test test-federation check bench bench-peers docs clean

# A new pip first: that of an old Python takes twice as long. Then torch, alone: asked for by another
# package, pip may choose a build with gigabytes of GPU libraries.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) -e '.[report]'
	touch $@

# All extras: data sets, trackers, Flower and what the tests are run with.
$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[dev]'
	touch $@

setup: $(VENV)/.ready

setup-dev: $(VENV)/.ready-dev

demo: setup
	$(BIN)/fedmerge compare --preset quick --out $(OUT)/demo

# Four hospitals on this machine, on Flower, with TLS and keys: about ten minutes.
federation: setup-dev
	$(BIN)/python examples/hospitals/run.py --out $(OUT)/federation

check: setup-dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

# With the tests of a real federation, which mostly wait: the other worker goes on meanwhile.
test: check
	$(BIN)/python -m pytest -n auto

# Federations of several processes, parts of which are killed: about four minutes.
test-federation: setup-dev
	$(BIN)/python -m pytest -m federation

bench: setup-dev
	$(BIN)/python -m benchmarks --out $(OUT)/benchmarks

# Other libraries, each in an environment of its own under $(OUT)/peers.
bench-peers: setup-dev
	$(BIN)/python -m benchmarks.peers --out $(OUT)/peers

docs: setup-dev
	$(BIN)/pdoc --output-directory $(OUT)/docs $(addprefix fedmerge.,algorithms data engine errors \
	  local merging models network params sim soup)

clean:
	rm -rf $(OUT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
