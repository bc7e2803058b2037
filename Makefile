# Each command sets up .venv first, if it is missing. `make help` lists the commands.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(if $(realpath $(BIN)/python),$(BIN)/python,python3)
PYTHON_VERSION := $(shell $(PYTHON) -c \
	'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready-$(PYTHON_VERSION)
# --clear if .venv is of another Python, or of one that a system upgrade has removed.
CLEAR := $(if $(realpath $(BIN)/python$(PYTHON_VERSION)),,--clear)
RUN := runs/demo
FORM ?= small
# SHORT=1: the short form of a test command. pytest runs only the tests marked `short`.
SHORT ?=
ONLY_SHORT := $(if $(SHORT),-m short)
AND_SHORT := $(if $(SHORT), and short)
FUZZ_SECONDS ?= $(if $(SHORT),20,60)
KILLS ?= $(if $(SHORT),3,50)
MAIN_JOB := $(addprefix tests/slurm/test_main_job.py::test_main_job,[docker] [podman])
TESTS := $(addprefix tests/,unit pretended runs campaigns/bench campaigns/peer campaigns/soak)
QUICK := -n 2 --dist loadfile -m 'not run and not slow' $(TESTS)
# Git's top-level files and folders. `make lint` ignores others, such as a user's runs.
TRACKED = $$(git ls-files $(1) | cut -d / -f 1 | sort -u)
CODE = $(call TRACKED,'*.py' '*.md' pyproject.toml)
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip checks the hashes of the constraints. It must not require a hash of the project's own folder.
PINNED := --no-require-hashes -c docker/constraints.txt --build-constraint docker/constraints.txt
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --only-binary :all: --no-annotate --custom-compile-command 'make lock' \
	pyproject.toml

.PHONY: help setup demo check test test-slow test-runs test-input test-faults test-fuzz \
	test-slurm test-docker test-soak test-gpu gpu gpu-carry same bench bench-quick study lint lock \
	clean other-python

help:
	@echo 'make setup        install everything into $(VENV) (about 6 minutes the first time)'
	@echo 'make demo         train a teacher, students without and with it, and compare them'
	@echo '                  (about 10 minutes; SEED=1 for other random numbers)'
	@echo 'make check        check style and types, run the quick unit tests (under 3 minutes)'
	@echo 'make test         run the quick tests with one, two and four workers (under 8 minutes)'
	@echo 'make test-slow    run the slow unit tests, and train as a user does (about 12 minutes)'
	@echo 'make test-runs    run all programs as a user does (about 15 minutes)'
	@echo 'make test-fuzz    read damaged checkpoints and options (FUZZ_SECONDS=60)'
	@echo 'make test-faults  kill runs, damage disks and checkpoints (KILLS=50: 12 minutes)'
	@echo 'make test-input   run the programs on bad input and on real data (about 5 minutes)'
	@echo 'make test-slurm   run jobs on a SLURM cluster on this machine (about 16 minutes)'
	@echo 'make test-docker  build the image, run jobs in it by docker and podman'
	@echo '                  (about 25 minutes the first time)'
	@echo 'make test-slurm SHORT=1'
	@echo '                  the short form, which CI runs (1 to 5 minutes). The commands from'
	@echo '                  test-slow to test-docker have one'
	@echo 'make test-soak    train for MINUTES=120, check that memory, files, threads and step'
	@echo '                  time stay constant'
	@echo 'make test-gpu     run the tests that need an NVIDIA GPU'
	@echo 'make gpu          run all checks that need a GPU, in 10 minutes on one GPU. The results'
	@echo '                  are in runs/gpu-DATE. A dry run: make gpu GPU="--device cpu"'
	@echo 'make gpu-carry    download into CARRY=DIR what make gpu needs on a machine without a'
	@echo '                  package registry (tests/README.md)'
	@echo 'make same         train with the code of OLD=COMMIT and with this code, compare all'
	@echo '                  bytes (about 4 minutes)'
	@echo 'make study        measure whether a matched student learns better features. On a CPU:'
	@echo '                  FORM=small (about 4 hours), longer (more epochs), simsiam (an hour),'
	@echo '                  distillers (all), distillers-long (the best, more epochs).'
	@echo '                  On a GPU: FORM=full, distillers-full'
	@echo 'make bench        measure speed against a plain baseline (about 20 minutes)'
	@echo 'make bench-quick  check that the bench works (about 3 minutes)'
	@echo 'make lint         check style, types and spelling'
	@echo 'make lock         pin the versions and hashes of all packages (UPGRADE=--upgrade: the'
	@echo '                  newest that pyproject.toml allows)'
	@echo 'make clean        remove $(VENV) and the demo runs'

setup: $(READY)

$(READY): pyproject.toml docker/pip.txt docker/constraints.txt docker/build_horovod.sh $(if $(CLEAR),other-python)
	@[[ "$(PYTHON_VERSION)" =~ ^3\.1[1-4]$$ ]] || \
	{ echo 'setup: PYTHON=$(PYTHON): $(or $(PYTHON_VERSION),missing); expected Python 3.11 to 3.14.' \
		'Run make PYTHON=python3.12 ...' >&2; exit 2; }
	@for tool in g++ make; do command -v $$tool >/dev/null || \
	{ echo "setup: no $$tool. Run apt-get install g++ make" >&2; exit 2; }; done
	@echo 'setup 1/3: making $(VENV)'
	@$(PYTHON) -m venv $(CLEAR) $(VENV) || { echo 'setup: cannot make a virtual environment.' \
		'Run apt-get install python3-venv python3-dev' >&2; exit 2; }
	@include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	[ -e "$$include/Python.h" ] || \
	{ echo 'setup: no Python headers. Run apt-get install python3-dev' >&2; exit 2; }
	@echo 'setup 2/3: installing torch and the other packages (about 2 minutes, several GB)'
	@$(BIN)/python -m pip install --quiet --require-hashes -r docker/pip.txt
	@$(BIN)/python -m pip install --progress-bar off $(PINNED) --only-deps '.[horovod,test]' | \
		sed -un 's/^\(Collecting\|Downloading\|Installing\) \([^ ]*\).*/  \1 \2/p'
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@echo 'setup 3/3: Horovod'
	@docker/build_horovod.sh $(BIN)/python
	@touch $@
	@echo 'setup: done. For the commands of $(BIN), run: . $(BIN)/activate'

# Pin all versions with hashes. .venv and the image install a part of them.
lock:
	@[ -x $(BIN)/uv ] || $(BIN)/python -m pip install -q uv
	@$(LOCK) $(UPGRADE) --all-extras --group nvcc -o docker/constraints.txt

# Train a teacher, and students without and with it. Compare their features.
demo: $(READY)
	@$(BIN)/python -m job.study.demo $(RUN) $(if $(SEED),--seed $(SEED))

# Run it after each change. It needs about 3 minutes of CPU time for tests and up to 40 s for lint:
# about 2 minutes on two idle cores.
check: lint
	@$(BIN)/python -m pytest -q $(QUICK)

# Coverage excludes the tests that start runs: it makes the start of a process a sixth slower, and
# most of their time is such starts.
test: $(READY)
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(QUICK)
	@echo 'tests with 2 workers'
	@$(BIN)/horovodrun -np 2 $(BIN)/coverage run -m pytest -q tests/workers
	@echo 'tests with 4 workers'
	@$(BIN)/horovodrun -np 4 $(BIN)/python -m pytest -q tests/workers
	@$(BIN)/coverage combine -q && $(BIN)/coverage report

# Its coverage is added to that of the last `make test`.
test-slow: $(READY)
	@$(BIN)/coverage run -m pytest -n 2 --dist loadfile -m 'slow and not run$(AND_SHORT)' $(TESTS)
	@$(BIN)/coverage combine -q --append && $(BIN)/coverage report
	@$(BIN)/python -m pytest $(ONLY_SHORT) tests/runs/test_train.py

test-runs: $(READY)
	@$(BIN)/python -m pytest -m 'run$(AND_SHORT)' --ignore=tests/runs/test_train.py \
		tests/runs tests/campaigns/bench tests/campaigns/peer

test-input: $(READY)
	@$(BIN)/python -m pytest $(ONLY_SHORT) tests/campaigns/input

test-fuzz: $(READY)
	@$(BIN)/python -W ignore tests/campaigns/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

# SEED=N repeats the kills of the campaign that printed this seed.
test-faults: $(READY)
	@$(BIN)/python -m pytest -q $(ONLY_SHORT) tests/campaigns/faults
	@$(BIN)/python tests/campaigns/faults/campaign.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))

test-slurm: $(READY)
	@$(BIN)/python -m pytest $(ONLY_SHORT) tests/slurm --ignore=tests/slurm/test_docker_jobs.py \
		$(addprefix --deselect=,$(MAIN_JOB))

test-docker: $(READY)
	@$(BIN)/python -m pytest $(ONLY_SHORT) tests/docker tests/slurm/test_docker_jobs.py $(MAIN_JOB)

test-soak: $(READY)
	@$(BIN)/python tests/campaigns/soak/soak.py --minutes $(or $(MINUTES),120)

test-gpu: $(READY)
	@PYTHONPATH=$(CURDIR) $(BIN)/python tests/gpu/no_gpu.py
	@TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu

gpu: $(READY)
	@$(BIN)/python tests/gpu/session.py $(GPU)

gpu-carry: $(READY)
	@$(if $(CARRY),,echo 'CARRY: missing; expected a folder. Set CARRY=DIR' >&2; exit 2;) \
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/gpu/carry.py $(CARRY) $(CARRY_OPTIONS)

same: $(READY)
	@$(if $(OLD),,echo 'OLD: missing; expected a commit. Set OLD=HEAD~1' >&2; exit 2;) \
	$(BIN)/python tests/campaigns/same/same.py $(OLD)

study: $(READY)
	@$(BIN)/python -m job.study.study $(FORM) --out runs/study-$(notdir $(FORM))

bench: $(READY)
	@$(BIN)/python tests/campaigns/bench/bench.py

bench-quick: $(READY)
	@$(BIN)/python tests/campaigns/bench/bench.py --quick

lint: $(READY)
	@$(BIN)/ruff check $(CODE) && $(BIN)/ruff format --check $(CODE)
	@$(BIN)/typos --format brief $(call TRACKED) && $(BIN)/mypy
	@shellcheck -x docker/*.sh slurm/*.sh slurm/*.sbatch .ci/run

clean:
	rm -rf $(VENV) $(RUN)
