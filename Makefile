PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
COPY := build/copy
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test test-all soak nightly lint format clean

# The first minute: a network learns handwritten digits by forward passes alone.
train: $(VENV)/train
	$(BIN)/fwdlearn train quickstart

test: $(VENV)/dev
	WANDB_MODE=offline $(BIN)/python -m pytest

# With the tests that take minutes.
test-all: $(VENV)/dev
	WANDB_MODE=offline $(BIN)/python -m pytest -m "slow or not slow"

# Runs that are killed a hundred times, and files that are changed ten thousand times.
soak: $(VENV)/dev
	WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/ledger

# The same, two thousand times, and a run of a million steps: a night on two cores.
KILLS ?= 2000
STEPS ?= 1000000
nightly: $(VENV)/dev
	WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -rP tests/ledger/test_kill.py \
		--kills $(KILLS)
	WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --steps $(STEPS)

# Types and docstring examples are checked on an installed copy: in a checkout the mapped folders
# are not where an import looks for them.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(COPY) build/lib build/bdist*
	$(PIP) --no-deps --target $(COPY) .
	cd $(COPY) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/setup.cfg -p fwdlearn
	cd $(COPY) && PYTHONPATH=. $(abspath $(BIN))/python -m pytest -q -c $(CURDIR)/setup.cfg \
		--rootdir . --doctest-modules fwdlearn

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Torch goes first and alone, so that nothing else can choose another build of it.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	touch $@

$(VENV)/train: $(VENV)/torch setup.cfg
	$(PIP) -e ".[data]"
	touch $@

$(VENV)/dev: $(VENV)/torch setup.cfg
	$(PIP) -e ".[dev]"
	touch $@
