# make demo, make test: each sets up .venv first, if it is not there yet.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(if $(realpath $(BIN)/python),$(BIN)/python,python3)
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready-$(PYTHON_VERSION)
# If .venv belongs to another Python, or to one that an upgrade of the system has removed.
CLEAR := $(if $(realpath $(BIN)/python$(PYTHON_VERSION)),,--clear)
RUN := runs/demo
FORM ?= small
FUZZ_SECONDS ?= 60
KILLS ?= 50
MAIN_JOB := $(addprefix tests/slurm/test_main_job.py::test_main_job,[docker] [podman])
TESTS := $(addprefix tests/,unit pretended runs campaigns/bench campaigns/peer campaigns/soak)
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip checks the hashes of the constraints. It must not require one of the project's own folder, which has none.
PINNED := --no-require-hashes -c docker/constraints.txt --build-constraint docker/constraints.txt
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --only-binary :all: \
	--no-annotate --custom-compile-command 'make lock' pyproject.toml

.PHONY: help setup demo check test test-runs test-input test-faults test-fuzz test-slurm test-docker test-soak test-gpu gpu gpu-carry same bench bench-quick study lint lock clean other-python

help:
	@echo 'make setup   install everything into $(VENV) (about 6 minutes the first time)'
	@echo 'make demo    train a teacher and a student on handwritten digits with two workers (8 to 14 minutes)'
	@echo 'make check   check style and types, and run the quick unit tests (under 3 minutes)'
	@echo 'make test    run the tests with one, two and four workers (about 15 minutes)'
	@echo 'make test-runs    train, classify, pack, report and study as a user does, with the real commands (about 15 minutes)'
	@echo 'make test-fuzz    feed checkpoint and option readers damaged input for FUZZ_SECONDS (60)'
	@echo 'make test-faults  kill runs and damage disks and checkpoints (about 12 minutes; KILLS=8: about 4)'
	@echo 'make test-input   run bad input of every kind, and real data as it comes, through the command line (about 5 minutes)'
	@echo 'make test-slurm   run jobs on a real SLURM of two nodes on this machine (about 16 minutes)'
	@echo 'make test-docker  build the image, and run the job and SLURM jobs in it, by docker and podman (about 20 minutes the first time)'
	@echo 'make test-soak MINUTES=120  train for so long, and see that memory, files, threads and step time stay as they are'
	@echo 'make test-gpu  run the tests that need an NVIDIA GPU'
	@echo 'make gpu     prove in 10 minutes, on one GPU, all that no CPU can; results in runs/gpu-DATE (GPU="--device cpu": a dry run)'
	@echo 'make gpu-carry CARRY=DIR  fill a folder with what make gpu needs where no registry is reachable (tests/README.md)'
	@echo 'make same OLD=COMMIT  train with the code of an older commit and with this one, and compare all bytes (about 4 minutes)'
	@echo 'make study   see whether a matched student learns better features (about 4 hours; FORM=longer: more epochs; FORM=simsiam: about an hour; FORM=distillers: all distillers; FORM=distillers-long: the leaders in more epochs; FORM=full, distillers-full: on a GPU)'
	@echo 'make bench   measure how fast all is, beside a plain baseline and the bare work (about 12 minutes)'
	@echo 'make bench-quick  see that the bench works (under 90 seconds)'
	@echo 'make lint    check style, types and spelling'
	@echo 'make lock    write the versions and hashes of all packages (UPGRADE=--upgrade: the newest that pyproject.toml allows)'
	@echo 'make clean   remove $(VENV) and the demo runs'

setup: $(READY)

$(READY): pyproject.toml docker/pip.txt docker/constraints.txt docker/build_horovod.sh $(if $(CLEAR),other-python)
	@[[ "$(PYTHON_VERSION)" =~ ^3\.1[1-4]$$ ]] || { echo 'setup: Python 3.11 to 3.14 is needed; $(PYTHON) is $(or $(PYTHON_VERSION),missing): make PYTHON=python3.12 ...' >&2; exit 2; }
	@for tool in g++ make; do command -v $$tool >/dev/null || { echo "setup: no $$tool here: apt-get install g++ make" >&2; exit 2; }; done
	@echo 'setup 1/3: making $(VENV)'
	@$(PYTHON) -m venv $(CLEAR) $(VENV) || { echo 'setup: could not make a virtual environment: apt-get install python3-venv python3-dev' >&2; exit 2; }
	@$(BIN)/python -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo 'setup: no Python headers: apt-get install python3-dev' >&2; exit 2; }
	@echo 'setup 2/3: installing torch and the rest (about 2 minutes, several GB)'
	@$(BIN)/python -m pip install --quiet --require-hashes -r docker/pip.txt
	@$(BIN)/python -m pip install --progress-bar off $(PINNED) --only-deps '.[horovod,test]' | sed -un 's/^\(Collecting\|Downloading\|Installing\) \([^ ]*\).*/  \1 \2/p'
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@echo 'setup 3/3: Horovod'
	@docker/build_horovod.sh $(BIN)/python
	@touch $@

# All versions, with hashes, of which .venv and the image take what they need.
lock:
	@[ -x $(BIN)/uv ] || $(BIN)/python -m pip install -q uv
	@$(LOCK) $(UPGRADE) --all-extras --group nvcc -o docker/constraints.txt

# The whole story: a teacher by itself, a student guided by it, and how good their features are.
demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash job/demo.sh $(RUN)

# For after each change. Its CPU time, 3 minutes of tests and up to 40 s of lint, makes it about 2 minutes on two idle cores.
check: lint
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not run and not slow' $(TESTS)

# Coverage is that of the tests which start no whole runs: under it a process starts a sixth slower, most of the time of those.
test: $(READY)
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -n 2 --dist loadfile -m 'not run' $(TESTS)
	@$(BIN)/python -m pytest tests/runs/test_train.py
	@echo 'tests with 2 workers'; $(BIN)/horovodrun -np 2 $(BIN)/coverage run -m pytest -q tests/workers
	@echo 'tests with 4 workers'; $(BIN)/horovodrun -np 4 $(BIN)/python -m pytest -q tests/workers
	@$(BIN)/coverage combine -q && $(BIN)/coverage report

test-runs: $(READY)
	@$(BIN)/python -m pytest -m run --ignore=tests/runs/test_train.py $(TESTS)

test-input: $(READY)
	@$(BIN)/python -m pytest tests/campaigns/input

test-fuzz: $(READY)
	@$(BIN)/python -W ignore tests/campaigns/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

# SEED=N aims the kills as a run did that has named it.
test-faults: $(READY)
	@$(BIN)/python -m pytest -q tests/campaigns/faults
	@$(BIN)/python tests/campaigns/faults/campaign.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))

test-slurm: $(READY)
	@$(BIN)/python -m pytest tests/slurm --ignore=tests/slurm/test_docker_jobs.py $(addprefix --deselect=,$(MAIN_JOB))

test-docker: $(READY)
	@$(BIN)/python -m pytest tests/docker tests/slurm/test_docker_jobs.py $(MAIN_JOB)

test-soak: $(READY)
	@$(BIN)/python tests/campaigns/soak/soak.py --minutes $(or $(MINUTES),120)

test-gpu: $(READY)
	@PYTHONPATH=$(CURDIR) $(BIN)/python tests/gpu/no_gpu.py
	@TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu

gpu: $(READY)
	@$(BIN)/python tests/gpu/session.py $(GPU)

gpu-carry: $(READY)
	@$(if $(CARRY),,echo 'CARRY is missing; expected a folder, as in: make gpu-carry CARRY=carried' >&2; exit 2;) \
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/gpu/carry.py $(CARRY) $(CARRY_OPTIONS)

same: $(READY)
	@$(if $(OLD),,echo 'OLD is missing; expected a commit, as in: make same OLD=HEAD~1' >&2; exit 2;) \
	$(BIN)/python tests/campaigns/same/same.py $(OLD)

study: $(READY)
	@$(BIN)/python -m job.study.study $(FORM) --out runs/study-$(notdir $(FORM))

bench: $(READY)
	@$(BIN)/python tests/campaigns/bench/bench.py

bench-quick: $(READY)
	@$(BIN)/python tests/campaigns/bench/bench.py --quick

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/typos --format brief . && $(BIN)/mypy
	@shellcheck -x docker/*.sh slurm/*.sh slurm/*.sbatch job/demo.sh .ci/run

clean:
	rm -rf $(VENV) $(RUN)
