# From a fresh clone, with python3 (3.10 or newer, with venv and headers), make and a C++20 compiler: "make demo".
# Everything lives in .venv and build/. A second run reuses what is there: .venv/.installed is as old as the packages,
# .venv/.built as the extension. CUDA sources are compiled where there is an nvcc (DPCOMM_CUDA=OFF leaves them out).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RESULTS := benchmarks/results
GPUS ?= 1
NCCL_FLAGS ?= --json $(RESULTS)/nccl-$(GPUS)gpus.json --plot $(RESULTS)/nccl-$(GPUS)gpus.png
BENCH_FLAGS ?= --json $(RESULTS)/allreduce-2ranks.json --plot $(RESULTS)/allreduce-2ranks.png

requirements := $(wildcard requirements/*.txt)
# Folders are listed too: their time changes when a file comes or goes.
sources := setup.py pyproject.toml $(shell find csrc)
cpp_sources = $(shell find csrc tests/cpp benchmarks/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint bench bench-smoke bench-train bench-network bench-nccl gpu-check gpu-static format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(VENV)/.installed: $(requirements)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dpcomm needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(requirements:%=-r %)
	touch $@

$(VENV)/.built: $(VENV)/.installed $(sources)
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

venv: $(VENV)/.built ## .venv with pinned packages and dpcomm in editable form

demo: venv ## train a small language model in two processes: gloo, dpcomm, dpcomm fp16
	$(BIN)/python examples/train_lm.py --demo

test: venv ## all tests; those marked gpu are skipped where there is no GPU
	$(BIN)/python -m pytest

lint: venv ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(cpp_sources)

bench: venv ## benchmarks/results: dpcomm against everybody, from Python and C++; about 35 minutes
	$(BIN)/python benchmarks/allreduce.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/report.py
	for ranks in 2 4 8; do \
	  $(BIN)/python benchmarks/rivals.py --ranks $$ranks --json $(RESULTS)/rivals-$${ranks}ranks.json || failed=1; done; \
	  $(BIN)/python benchmarks/report.py --render && test -z "$$failed"

bench-smoke: venv ## ratios to gloo beside the committed ones, as information; under a minute
	$(BIN)/python benchmarks/smoke.py

bench-train: venv ## step times of data-parallel training, dpcomm against stock DDP; under 8 minutes
	$(BIN)/python benchmarks/train.py --out benchmarks/results

bench-network: venv ## dpcomm between hosts that are network namespaces, beside gloo; as root; about 30 minutes
	$(BIN)/python benchmarks/network.py

bench-nccl: venv ## dpcomm beside stock NCCL on this host: GPUS=8 for eight GPUs; with one, virtual ranks
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(GPUS) benchmarks/nccl.py $(NCCL_FLAGS)

gpu-check: venv ## build and run what needs a GPU; stops at once where there is none
	$(BIN)/python benchmarks/gpu_check.py

# The disassembler is not part of every CUDA Toolkit. A newer one reads the code of an older compiler.
gpu-static: venv ## compile the kernels; compare registers, spills, accesses with the committed table; needs no GPU
	$(PIP) install --quiet nvidia-cuda-nvdisasm==13.5.37
	$(BIN)/python benchmarks/gpu_static.py $(STATIC_FLAGS)

format: venv ## rewrite the sources as "make lint" wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(cpp_sources)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build runs dpcomm.egg-info dpcomm/_native.*.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
