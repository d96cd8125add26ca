# Everything runs in .venv (made from constraints.txt); `make` alone lists what there is.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help venv test lint quickstart clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables:        PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV), PIP_FLAGS=..."
	@echo "  without a GPU:    PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu' avoids CUDA packages"

venv: $(VENV)/.installed  ## make the virtual environment with pinned packages and dsvlm itself

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make venv PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

test: venv  ## run the whole test suite, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: venv  ## check the code with ruff
	$(BIN)/ruff check .

quickstart: venv data/scenes  ## embedded data, a tiny model on 2 ranks with ZeRO-3, evaluation, report
	$(BIN)/dsvlm train quickstart --nproc 2
	$(BIN)/dsvlm eval runs/quickstart
	$(BIN)/dsvlm report runs/quickstart
	@echo "the report: $(CURDIR)/runs/quickstart/report.html"

data/scenes: | venv
	rm -rf data/scenes.part
	$(BIN)/dsvlm data convert scenes --out data/scenes.part
	mv data/scenes.part data/scenes

clean:  ## remove what the targets made, but keep data/ and runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
