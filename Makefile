# Every target sets up what it needs from nothing, in .venv.  ROLLOUT=sglang makes the quickstart use SGLang.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MCORE19 := .venv-mcore19
BRIDGE := .venv-bridge
ROLLOUT ?= native
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

MCORE19_TESTS ?= tests/distributed
# `make test` has neither the libraries of the sinks nor the OpenAI client nor libraries of environments.
EXTRA_TESTS := tests/unit/pipeline/monitoring/test_sinks.py tests/unit/pipeline/monitoring/test_deliver.py \
  tests/unit/pipeline/rollout/test_own_environment.py tests/unit/pipeline/rollout/test_library_environments.py

# SGLang's torchvision is a build for CUDA; with these two in the environment it can be imported.
MEND := requirements/torchvision_without_cuda.py requirements/torchvision_without_cuda.pth

# Makes the environment $(1), which sees the packages of $(VENV) behind its own. Its pip leaves those as they are.
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
define beside
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(1)/bin/python $(PURELIB))/beside.pth"
endef

LAUNCH := $(addprefix requirements/,launch.txt monitor.txt browser.txt environments.txt)

.PHONY: quickstart test test-integration test-mcore19 lint docs bench bridge-env clean

quickstart: $(VENV)/.ready $(if $(filter sglang,$(ROLLOUT)),$(VENV)/.ready-sglang)
	$(BIN)/python tools/quickstart.py --rollout $(ROLLOUT)

# tests/conftest.py says in which order the two workers take the files.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# One test at a time to each of three workers, for those on Slurm mostly wait. A group goes to one worker as a whole, so
# that what its tests share (servers, a cluster, a run that others are compared with) starts once.
test-integration: $(VENV)/.ready-launch
	$(BIN)/python -m pytest -n 3 --dist loadgroup tests/integration $(EXTRA_TESTS)

# The newest megatron-core that the learner serves, on its distributed tests; `make test` has the oldest.
test-mcore19: $(MCORE19)/.ready
	$(MCORE19)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(MCORE19_TESTS)

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site, in build/site; a broken link fails it.
docs: $(VENV)/.ready-docs
	$(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.ready
	$(BIN)/python -m tools.bench.logprobs --json runs/bench/logprobs.json
	$(BIN)/python tools/bench/batching.py
	$(BIN)/python -m tools.bench.step_time

# megatron-bridge, in an environment of its own that sees the packages of $(VENV): for
# tests/integration/test_bridge_oracle.py and tools/bench/conversion.py --bridge-python $(BRIDGE)/bin/python
bridge-env: $(BRIDGE)/.ready

clean:
	rm -rf $(VENV) $(MCORE19) $(BRIDGE)

$(VENV)/.ready: pyproject.toml requirements/torch.txt requirements/cpu.txt
	@echo "installing pinned packages into $(VENV): some minutes, up to 6 GB; pip prints nothing meanwhile"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements/torch.txt
	$(BIN)/python -m pip install -q -r requirements/cpu.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# megatron-core 0.19 asks for Python 3.12 and for packages that need CUDA; what the learner uses of it runs without both.
$(MCORE19)/.ready: $(VENV)/.ready requirements/mcore19-no-deps.txt
	$(call beside,$(MCORE19))
	$(MCORE19)/bin/python -m pip install -q --no-deps --ignore-requires-python -r requirements/mcore19-no-deps.txt
	touch $@

$(VENV)/.ready-sglang: $(VENV)/.ready requirements/sglang-cpu.txt requirements/sglang-cpu-no-deps.txt $(MEND)
	$(BIN)/python -m pip install -q -r requirements/sglang-cpu.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements/sglang-cpu-no-deps.txt
	cp $(MEND) "$$($(BIN)/python $(PURELIB))"
	touch $@

$(BRIDGE)/.ready: $(VENV)/.ready-sglang requirements/bridge.txt
	$(call beside,$(BRIDGE))
	$(BRIDGE)/bin/python -m pip install -q --no-deps --ignore-requires-python -r requirements/bridge.txt
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready requirements/docs.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements/docs.txt
	touch $@

$(VENV)/.ready-launch: $(VENV)/.ready-sglang $(LAUNCH)
	$(BIN)/python -m pip install -q --no-deps $(LAUNCH:%=-r %)
	touch $@
