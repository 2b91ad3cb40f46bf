# `make demo` and `make test` work in a fresh clone; see README.md for what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# dvc.yaml runs `isim`, which must be the one of this virtual environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo demo-evidence test lint ui bench clean

demo: $(INSTALLED)
	dvc repro
	@isim results

demo-evidence: $(INSTALLED)
	python benchmarks/demo_evidence.py

test: $(INSTALLED)
	python -m pytest

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy

# One worker and no job runner: starts several times faster in a quarter of the memory.
ui: $(INSTALLED)
	python -m isim.tracking ui

bench: $(INSTALLED)
	for file in benchmarks/*.py; do echo "== $$file"; python "$$file" || exit 1; done

# One stamp for the whole environment: it is renewed when what it was built from changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'isim needs Python >= 3.11; set it by: make PYTHON=python3.12 ...' >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo 'pydensecrf2 compiles: install g++ (Debian, Ubuntu: apt-get install g++)' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@
