# Everything a checkout can do; `make` alone lists it. Needs python3 >= 3.11 and PyPI.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
STORE := data/lidc
comma := ,
RUN := runs/demo
# libtpu (213 MB) lets `mmfm plan` be tested without a TPU; leave `tpu` out and those tests are skipped.
# torch comes from PyPI with several GB of CUDA on Linux unless pip is shown a CPU build (PIP_FLAGS); leave `reference`
# out to do without: make test TEST_EXTRAS=samples,evaluate,test,ingest,presidio,quantised,tpu
TEST_EXTRAS ?= samples,evaluate,test,ingest,presidio,quantised,reference,tpu
# Files are handed out in their order, the longest first (tests/conftest.py). A worker that crashes is not replaced:
# pytest-xdist 3.8 then waits for ever (its issues 1323, 1327 and 1378).
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# For the scripts of benchmarks/, as `mmfm` does for itself: a step's scratch memory comes in huge pages.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
test test-newest axes: export GLIBC_TUNABLES := glibc.malloc.hugetlb=0 # they take more memory than small programs need

.DEFAULT_GOAL := help
.PHONY: help rows demo test lint test-newest axes launch-slurm ingest-ray seeds curve precision scan feed films memory bench
.PHONY: pods gpu fields clean
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
	$(call install,samples$(comma)evaluate)

$(VENV)/.idc: pyproject.toml
	$(call install,idc$(comma)evaluate)

$(VENV)/.test: pyproject.toml
	$(call install,$(TEST_EXTRAS))

RAY_EXTRAS := samples,evaluate,test,ingest,ray
$(VENV)/.ray: pyproject.toml
	$(call install,$(RAY_EXTRAS))

$(VENV)/.lint: pyproject.toml
	$(call install,lint)

# ---------------------------------------------------------------- what a newcomer runs

demo: $(VENV)/.samples  ## build the built-in store, train on the CPU, evaluate on held-out patients
	@$(BIN)/mmfm sample lidc --out $(STORE)
	@$(BIN)/mmfm train configs/demo.yaml --run $(RUN)
	@$(BIN)/mmfm evaluate $(RUN)

rows: $(VENV)/.idc  ## a million rows: build the store, then start-up, random rows a second and memory, before and after
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python benchmarks/rows.py data/idc

test: lint $(VENV)/.test  ## lint, then run every test and notebook
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.test $(VENV)/.lint  ## ruff, pyright, the layers of imports and shellcheck
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch

# ---------------------------------------------------------------- what is run by hand

# Python 3.12 or newer on the PATH or among pyenv's, and with it the newest release of everything.
NEWEST = $(firstword $(foreach p,python3.12 python3.13 python3.14 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3),\
  $(if $(shell $(p) -c 'import sys; print("new" if sys.version_info >= (3, 12) else "")' 2>/dev/null),$(p))))

test-newest:  ## run the tests on python3.12 or newer with the newest jax
	@test -n "$(NEWEST)" || { echo "no python3.12 or newer was found; put one on the PATH" >&2; exit 2; }
	@$(MAKE) --no-print-directory PYTHON=$(NEWEST) VENV=.venv-newest TEST_EXTRAS=samples,evaluate,test,ingest,quantised,tpu \
	  PIP_FLAGS='$(PIP_FLAGS) --upgrade --upgrade-strategy eager' .venv-newest/.test
	@.venv-newest/bin/python -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)'
	.venv-newest/bin/python -m pytest $(PYTEST_FLAGS)

launch-slurm: $(VENV)/.test  ## train, preempt and resume under a real Slurm of two nodes on this machine (needs root)
	@$(BIN)/python tests/launch/slurm.py

axes: $(VENV)/.test  ## each mesh axis alone and all four on 16 virtual devices, beside one device (ten minutes)
	MMFM_TEST_DEVICES=16 $(BIN)/python -m pytest tests/parallel/test_mesh.py -k losses_gradients

ingest-ray: $(VENV)/.ray  ## ingest on a Ray cluster of three machines on this one, one of them killed (a minute)
	@$(BIN)/python -m pytest tests/data/ingest/ray_cluster.py

seeds: $(VENV)/.samples  ## the demo with three seeds and with a second split of the patients (half an hour)
	@$(BIN)/python benchmarks/seeds.py

curve: $(VENV)/.samples  ## the demo on a quarter, half and all of its training patients, two seeds (an hour)
	@$(BIN)/python benchmarks/curve.py

$(VENV)/.quantised: pyproject.toml
	$(call install,samples$(comma)evaluate$(comma)quantised)

precision: $(VENV)/.quantised  ## the demo's first steps in float32, bfloat16, int8 and fp8 (eight minutes)
	@$(BIN)/python benchmarks/precision.py

scan: $(VENV)/.samples  ## compile time of a step by the depth of its encoders (two minutes)
	@$(BIN)/python benchmarks/scan.py

feed: $(VENV)/.samples  ## how long an H100's step would wait for this machine to read CT volumes (two minutes)
	@$(BIN)/python benchmarks/feed.py

films: $(VENV)/.samples  ## what a film costs the host, and how many a second by worker processes (a minute)
	@$(BIN)/python benchmarks/films.py

memory: $(VENV)/.samples  ## resident memory over 2,000 batches of a store far larger than the cache (two minutes)
	@$(BIN)/python benchmarks/memory.py

$(VENV)/.tpu: pyproject.toml
	$(call install,samples$(comma)tpu)

pods: $(VENV)/.tpu  ## plan every pod configuration for its pod and keep what was found in configs/pods.json (an hour)
	@$(BIN)/python benchmarks/pods.py

# Makes no environment and needs no network: PYTHON has JAX and PyTorch, and what it lacks comes as wheels in a folder.
gpu:  ## what one GPU does, as rows of docs/performance.md: make gpu PYTHON=python3 WHEELS=wheels (ten minutes)
	@$(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS))

bench: $(VENV)/.samples  ## speed of reading and of the training step on this machine
	@$(BIN)/python benchmarks/speed.py

fields: $(VENV)/.samples  ## the schemas and the pages of all fields anew, after a change to one
	@$(BIN)/mmfm schema > configs/experiment.schema.json
	@$(BIN)/mmfm schema dataset > configs/data/dataset.schema.json
	@$(BIN)/mmfm schema experiment --markdown > docs/experiment.md
	@$(BIN)/mmfm schema dataset --markdown > docs/dataset.md

clean:  ## remove environments and caches; stores and runs stay
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +
