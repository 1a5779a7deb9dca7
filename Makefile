# Every target sets up what it needs from nothing, in .venv.  ROLLOUT=sglang makes the quickstart use SGLang.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ROLLOUT ?= native
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart test test-integration lint bench clean

quickstart: $(VENV)/.ready $(if $(filter sglang,$(ROLLOUT)),$(VENV)/.ready-sglang)
	$(BIN)/python tools/quickstart.py --rollout $(ROLLOUT)

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-integration: $(VENV)/.ready-launch
	$(BIN)/python -m pytest tests/integration

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python tools/bench/step_time.py

clean:
	rm -rf $(VENV)

$(VENV)/.ready: pyproject.toml requirements/torch.txt requirements/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements/torch.txt
	$(BIN)/python -m pip install -q -r requirements/cpu.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.ready-sglang: $(VENV)/.ready requirements/sglang-cpu.txt requirements/sglang-cpu-no-deps.txt
	$(BIN)/python -m pip install -q -r requirements/sglang-cpu.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements/sglang-cpu-no-deps.txt
	touch $@

$(VENV)/.ready-launch: $(VENV)/.ready-sglang requirements/launch.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements/launch.txt
	touch $@
