# make run | test | processes | matrix | check: each sets up what it needs in .venv first, and only once.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14 python3.10 python, \
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 10) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# bytecode is written even where the environment says otherwise: tests start many processes
TESTS := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal
SOURCES := pyproject.toml setup.cfg constraints.txt

.PHONY: run test processes matrix check format docs tables ledger clean help

run: $(VENV)/.installed  ## run the main job: configs/quickstart.yaml
	$(BIN)/fedsim run quickstart
	@echo "Next, after '. $(VENV)/bin/activate':"
	@echo "  fedsim run                              all methods and streams, a line each"
	@echo "  fedsim run lorm partition.alpha=0.1     clients that have less in common"
	@echo "  fedsim run fashion er                   a stream that tells methods apart"
	@echo "  fedsim report runs                      what was run, as one HTML file with charts"

test: $(VENV)/.installed-test  ## run the tests
	$(TESTS) tests

processes: $(VENV)/.installed-test  ## run the tests that start, kill and drive other processes: Ray, Flower, browsers, kill -9
	$(TESTS) -m processes tests

matrix: $(VENV)/.installed-test  ## play every mix of parts, where the tests play every pair
	$(TESTS) -m matrix tests

check: $(VENV)/.installed-dev  ## lint, format, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## put the code into ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs  ## build the documentation: docs/_build/html/index.html; fails on any warning
	$(BIN)/python -m docs.site

tables: $(VENV)/.installed-test  ## write docs/methods.md and docs/backbones.md: all methods, all backbones, and what goes with what; tests/mixes.txt
	$(BIN)/fedsim list --markdown > docs/methods.md
	$(BIN)/python -m tests.models.conformance > docs/backbones.md
	$(BIN)/python -m tests.test_matrix

# make ledger KNOWN=experiments/ledger/fashion.csv TUNED=experiments/ledger/fashion_tuned.csv makes the runs that the committed tables have not
KNOWN :=
TUNED :=
ledger: $(VENV)/.installed  ## every method on Fashion-MNIST, its table and docs/ledger/index.html: hours; goes on where it was stopped
	$(BIN)/fedsim sweep experiments/ledger/fashion.yaml --output runs/ledger/fashion $(addprefix --known ,$(KNOWN))
	$(BIN)/fedsim results runs/ledger/fashion $(KNOWN) --sweep fashion --csv experiments/ledger/fashion.csv
	$(BIN)/fedsim sweep experiments/ledger/fashion_tuned.yaml --known experiments/ledger/fashion.csv --output runs/ledger/fashion_tuned $(addprefix --known ,$(TUNED))
	$(BIN)/fedsim results runs/ledger/fashion_tuned experiments/ledger/fashion.csv $(TUNED) --sweep fashion_tuned --csv experiments/ledger/fashion_tuned.csv
	$(BIN)/fedsim ledger experiments/ledger/ledger.yaml

clean:  ## remove the environment and all caches
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "fedsim needs Python 3.10 or newer: none found, set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make environments: install its venv module (python3-venv)"; exit 1; }

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "setting up .venv (minutes on a cold machine)"
	$(PIP) --editable '.[report]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[report,flower,huggingface,tensorboard,wandb,mlflow,test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[report,flower,huggingface,tensorboard,wandb,mlflow,docs]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) --editable '.[report,flower,huggingface,tensorboard,wandb,mlflow,test,dev]'
	@touch $@
