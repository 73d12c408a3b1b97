# Two commands do everything a newcomer needs:
#   make quickstart   distil a streaming video model on this machine's CPU
#   make test         the fast tests
# Both build the environment (.venv) first. `make ci` is what CI runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
NEWEST_PYTHON ?= $(shell command -v python3.12)
WORKDIR ?= runs/quickstart
CONFIG ?= experiments/configs/moving_digits.py
WORKERS ?= 2

BIN := .venv/bin
PACKAGING := setup.cfg pyproject.toml crcm_jax/_version.py
# Settings of the tests' Python: CPU only, no TPU metadata server.
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart test lint types aot doctest docs dist newest parity \
        ci slow soak clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crcm_jax needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Each stamp is one set of extras; pip skips what is already there.
.venv/run.stamp: .venv/pyvenv.cfg $(PACKAGING)
	$(BIN)/python -m pip install -q -e '.[data,video]'
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install -q -e '.[data,video,dev]'
	@touch $@

.venv/tpu.stamp: .venv/dev.stamp
	$(BIN)/python -m pip install -q -e '.[tpu]'
	@touch $@

quickstart: .venv/run.stamp
	$(BIN)/crcm train --config $(CONFIG) --workdir $(WORKDIR)

test: .venv/dev.stamp
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations=15

slow: .venv/tpu.stamp
	$(BIN)/python -m pytest -q -n $(WORKERS) -m slow

# Kills tiny runs of every stage, over and over: docs/training.md.
soak: .venv/dev.stamp
	$(BIN)/python tools/soak.py --kills 50 --workdir runs/soak

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/pyright

# One process: libtpu allows one user at a time.
aot: .venv/tpu.stamp
	$(BIN)/python -m pytest -q -m aot

doctest: .venv/dev.stamp
	$(BIN)/python -m pytest -q --doctest-modules crcm_jax kernels

docs: .venv/dev.stamp
	$(BIN)/python tools/check_docs.py README.md CHANGELOG.md docs

# PyTorch's own implementations, in an environment of their own.
.venv/parity.stamp: .venv/pyvenv.cfg $(PACKAGING)
	$(PYTHON) -m venv .venv/parity
	.venv/parity/bin/python -m pip install -q -e '.[parity]'
	@touch $@

parity: .venv/parity.stamp
	.venv/parity/bin/python tools/record_wan.py --check

dist: .venv/dev.stamp
	$(BIN)/python tools/check_dist.py

newest: .venv/dev.stamp
	NEWEST_PYTHON='$(NEWEST_PYTHON)' tools/test_newest_jax.sh

ci: lint types test aot doctest docs dist newest
	@echo "make ci: all passed"

clean:
	rm -rf .venv .cache build dist *.egg-info
