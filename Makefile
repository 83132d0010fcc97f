# `make demo` and `make test` work on a fresh machine with Python (>= 3.11) and make: they create .venv where it is missing.
#   PYTHON=python3.12    the interpreter that .venv is made from
#   TORCH_INDEX=URL      a package index for torch alone, such as PyTorch's own of CPU builds: on Linux without a GPU it saves gigabytes
#   ARGS="--seed 7"      further options for `pipo demo`

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
CORE := .venv/.installed-core
DEV := .venv/.installed-dev
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.PHONY: demo test train-tiny bench-peers test-clients test-load test-sglang test-quant lint types docs clean

demo: $(CORE)
	$(BIN)/python -m pipo demo $(ARGS)

# Tiny models: more threads only wait for each other.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# The road of docs/training.md on the demo's world, by its own commands. ARGS: another folder than runs/tiny.
train-tiny: $(DEV)
	PIPO=$(BIN)/pipo recipes/tiny.sh $(ARGS)

# Engines of others beside ours, each in an environment of its own (docs/benchmarking.md). vLLM's takes 3.4 GB; llama.cpp is compiled.
PEERS := vllm llamacpp

bench-peers: $(CORE) $(foreach name,$(PEERS),.venvs/$(name)/.installed)
	$(BIN)/python -m pipo bench latency --peers hf,vllm,llamacpp $(foreach name,$(PEERS),--peer-python $(name)=.venvs/$(name)/bin/python) $(ARGS)

# Clients that others wrote, each in an environment of its own, against a real `pipo serve`.
CLIENTS := $(foreach name,openai2 openai3 schemathesis,.venvs/$(name)/.installed)

test-clients: $(DEV) $(CLIENTS)
	$(BIN)/python tests/clients/run.py $(ARGS)

# A load generator, for time to first token and per token. Its environment takes 1.2 GB.
test-load: $(DEV) .venvs/load/.installed
	$(BIN)/python tests/clients/run.py evalscope

# The plugin in stock SGLang, on this machine's CPU. Its environment takes 3 GB.
SGLANG := .venvs/sglang
SGLANG_PIP := $(SGLANG)/bin/python -m pip install --disable-pip-version-check --quiet

test-sglang: $(SGLANG)/.installed-ours
	$(SGLANG)/bin/python -m pytest -c tests/sglang/pytest.ini --rootdir tests/sglang tests/sglang $(ARGS)

# Weights of eight bits. torchao lies apart from .venv: see pyproject.toml.
QUANT := .venvs/quant

test-quant: $(DEV) $(QUANT)/.installed-torchao
	PYTHONPATH=$(QUANT) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/engine/test_quantization.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

docs: $(DEV)
	$(BIN)/python docs/generate_cli.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is not Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch goes first and alone, so that its index serves nothing else.
$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv (torch first: the first time, this takes some minutes)"
	$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -c constraints.txt -e .
	@touch $@

$(DEV): $(CORE)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

.venvs/%/.installed: tests/clients/%.txt | $(BIN)/python
	@echo "Installing into .venvs/$*"
	$(BIN)/python -m venv --clear .venvs/$*
	.venvs/$*/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

# Its packages for pictures and sound are builds for CUDA, which a torch without CUDA can't load.
.venvs/vllm/.installed: recipes/peers/vllm.txt | $(BIN)/python
	@echo "Installing into .venvs/vllm (torch first: this takes some minutes)"
	$(BIN)/python -m venv --clear .venvs/vllm
	.venvs/vllm/bin/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	.venvs/vllm/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	.venvs/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venvs/llamacpp/.installed: recipes/peers/llamacpp.txt | $(BIN)/python
	@echo "Compiling llama.cpp into .venvs/llamacpp (this takes some minutes)"
	$(BIN)/python -m venv --clear .venvs/llamacpp
	CMAKE_ARGS=-DLLAVA_BUILD=OFF .venvs/llamacpp/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

$(QUANT)/.installed-torchao: constraints.txt | $(BIN)/python
	@rm -rf $(QUANT)
	$(PIP) -c constraints.txt --no-deps --target $(QUANT) torchao
	@touch $@

$(SGLANG)/.installed: tests/sglang/requirements.txt constraints.txt | $(BIN)/python
	@echo "Installing into $(SGLANG) (torch first: this takes some minutes)"
	$(BIN)/python -m venv --clear $(SGLANG)
	$(SGLANG_PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(SGLANG_PIP) --no-deps -r $<
	@touch $@

# PIPO itself, and what SGLang lacks on a CPU.
$(SGLANG)/.installed-ours: $(SGLANG)/.installed pyproject.toml $(shell find tests/sglang/cpu -name '*.p*' -not -name '*.pyc')
	$(SGLANG_PIP) --no-deps --force-reinstall ./tests/sglang/cpu
	$(SGLANG_PIP) --no-deps -e .
	@touch $@

clean:
	rm -rf .venv .venvs .mypy_cache .pytest_cache .ruff_cache .hypothesis
