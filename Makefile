# make demo: install, then segment a photograph. make test: install, then run all tests. Each works alone.
# Other choices: make PYTHON=python3.12 ..., make PIP_FLAGS="--extra-index-url ..." ..., make test WORKERS=8

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
WORKERS ?= 3
BIN = $(VENV)/bin

.PHONY: demo test lint ruff mypy pytest clean

demo: $(VENV)/.installed
	$(BIN)/ibisagent segment "$$($(BIN)/python -c 'from pathlib import Path; import skimage; print(Path(skimage.__file__).parent / "data/retina.jpg")')" "Segment the optic disc." --output outputs/demo

# mypy runs beside the tests: alone, it would leave all cores but one idle for a minute.
test: ruff
	$(MAKE) --no-print-directory --jobs=2 mypy pytest

lint: ruff mypy

ruff: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks

mypy: $(VENV)/.installed-dev
	$(BIN)/mypy

# worksteal: each worker takes neighbouring tests, so that most fixtures of a file are made once. One worker more than the two
# cores of a small machine: some tests wait for a server or a browser.
pytest: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ibisagent needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# --no-compile: of 25,000 modules most are never imported; Python compiles the others when they are.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (only this once; minutes, as PyTorch is large) ..."
	@$(BIN)/python -m pip install -qq --no-compile $(PIP_FLAGS) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (only this once; minutes, as PyTorch is large) ..."
	@$(BIN)/python -m pip install -qq --no-compile $(PIP_FLAGS) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
