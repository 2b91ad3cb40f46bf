# `make demo` and `make test` work in a fresh clone; see README.md for what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
# Network threads share the cores with dCRF helpers and loaders: waiting, they must not spin.
export OMP_WAIT_POLICY ?= PASSIVE
# dvc.yaml runs `isim`, which must be the one of this virtual environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# A database that several processes touch first is lost.
STORE := from pathlib import Path; from isim.reporting import store; \
  store.create_database(store.tracking_uri(Path.cwd()))

.PHONY: demo repository demo-evidence test lint ui bench torture fuzz docs database

demo: repository database
	dvc repro
	@isim results

# Before the libraries are fetched. A source archive has no repository.
repository:
	@git rev-parse --git-dir >/dev/null 2>&1 || { \
	  echo 'no git repository, which DVC wants: run `git init`, then `make demo` again' >&2; exit 1; }

demo-evidence: $(INSTALLED)
	python benchmarks/demo_evidence.py

test: $(INSTALLED)
	python -m pytest

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	codespell

ui: $(INSTALLED)
	isim ui

database: $(INSTALLED)
	@python -c '$(STORE)'

# Damaged files for every reader, five minutes; other ones from another FIRST on.
fuzz: $(INSTALLED)
	PYTHONPATH=tests python -m support.fuzz --minutes $(or $(MINUTES),5) --first $(or $(FIRST),1000)

bench: $(INSTALLED)
	python benchmarks/all.py

# Outside the suite: twenty kills at random moments take about five minutes.
torture: $(INSTALLED)
	python benchmarks/torture.py

# Needs no network, and the site none either: site/index.html.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --clean --quiet

# One stamp for the whole environment: it is renewed when what it was built from changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'isim needs Python >= 3.11; set it by: make PYTHON=python3.12 ...' >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo 'pydensecrf2 compiles: install g++ (Debian, Ubuntu: apt-get install g++)' >&2; exit 1; }
	@echo 'installing into $(VENV): a few minutes, 6 GB'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# What builds is pinned, too: alone, pip would fetch the newest for pydensecrf2, and the Cython that
# it demands cannot build for Python 3.13.
	$(INSTALL) Cython setuptools wheel
	$(INSTALL) --no-build-isolation -e '.[dev,onnx]'
	touch $@
