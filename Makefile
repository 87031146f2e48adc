# Everything a checkout can do; `make` alone lists it. Needs python3 >= 3.11 and PyPI.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
STORE := data/lidc
RUN := runs/demo
# torch comes from PyPI with several GB of CUDA on Linux unless pip is shown a CPU build (PIP_FLAGS); leave `reference`
# out to do without: make test TEST_EXTRAS=samples,test
TEST_EXTRAS ?= samples,test,reference
PYTEST_FLAGS ?= -n 2 --dist loadfile
# On Linux the scratch memory of each step comes in huge pages: 4 KiB at a time costs the CPU a sixth of the step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-newest seeds bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # two installs into one environment would meet

help:  ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---------------------------------------------------------------- environments: $(VENV)/.NAME is newer than
# pyproject.toml exactly when the extras of NAME are installed as it asks

define install  # of the extras $(1) into $(VENV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Installing mmfm_jax[$(1)] into $(VENV); the first time takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) --editable '.[$(1)]'
	@touch $@
endef

$(VENV)/.samples: pyproject.toml
	$(call install,samples)

$(VENV)/.test: pyproject.toml
	$(call install,$(TEST_EXTRAS))

$(VENV)/.lint: pyproject.toml
	$(call install,lint)

# ---------------------------------------------------------------- what a newcomer runs

demo: $(VENV)/.samples  ## build the built-in store, train on the CPU, evaluate on held-out patients
	@$(BIN)/mmfm sample lidc --out $(STORE)
	@$(BIN)/mmfm train configs/demo.yaml --run $(RUN)
	@$(BIN)/mmfm evaluate $(RUN)

test: lint $(VENV)/.test  ## lint, then run every test and notebook
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.test $(VENV)/.lint  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# ---------------------------------------------------------------- what is run by hand

# Python 3.12 or newer on the PATH or among pyenv's, and with it the newest release of everything.
NEWEST = $(firstword $(foreach p,python3.12 python3.13 python3.14 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3),\
  $(if $(shell $(p) -c 'import sys; print("new" if sys.version_info >= (3, 12) else "")' 2>/dev/null),$(p))))

test-newest:  ## run the tests on python3.12 or newer with the newest jax
	@test -n "$(NEWEST)" || { echo "no python3.12 or newer was found; put one on the PATH" >&2; exit 2; }
	@$(MAKE) --no-print-directory PYTHON=$(NEWEST) VENV=.venv-newest TEST_EXTRAS=samples,test \
	  PIP_FLAGS='$(PIP_FLAGS) --upgrade --upgrade-strategy eager' .venv-newest/.test
	@.venv-newest/bin/python -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)'
	.venv-newest/bin/python -m pytest $(PYTEST_FLAGS)

seeds: $(VENV)/.samples  ## the demo with three seeds and with a second split of the patients (half an hour)
	@$(BIN)/python benchmarks/seeds.py

bench: $(VENV)/.samples  ## speed of reading and of the training step on this machine
	@$(BIN)/python benchmarks/speed.py

clean:  ## remove environments and caches; stores and runs stay
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +
