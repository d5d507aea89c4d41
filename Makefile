PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# A machine with a GPU takes torch's default build; any other the CPU build, where pip's index has one.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes || { rocminfo >/dev/null 2>&1 && echo yes; })
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint $(VENV)/torch.txt

.DELETE_ON_ERROR:
.PHONY: help demo test emulate lint bench docs clean

help:
	@echo "make demo     set up $(VENV) and run the demo: table, report and pictures in demo-output/"
	@echo "make test     set up $(VENV) and run the tests"
	@echo "make emulate  run the compiled kernels without a GPU, in minutes: error, bits and races of each"
	@echo "make lint     ruff and mypy"
	@echo "make bench    what everything costs here beside peers and the machine: tables, and rows in bench-output/"
	@echo "make docs     API reference as HTML in docs/api/"
	@echo "make clean    remove $(VENV) and what the commands left"

demo: $(VENV)/ready-cli
	$(BIN)/ood-engine demo

test: $(VENV)/ready-test
	$(BIN)/python -m pytest

emulate: $(VENV)/triton-3.6
	PYTHONPATH=$(VENV)/triton-3.6:kernels $(BIN)/python -m ood_kernels.emulation

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready-bench
	$(BIN)/python -m pytest benchmarks/

docs: $(VENV)/ready-docs
	$(BIN)/pdoc --output-directory docs/api --docformat google ood_engine ood_kernels '!ood_kernels.emulation'

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output bench-output docs/api .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/ready-venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/torch.txt: $(VENV)/ready-venv constraints/cpu.txt constraints/choose_torch.py
	$(if $(GPU),: >$@,$(BIN)/python constraints/choose_torch.py >$@)

# The Triton of torch 2.10 and 2.11, common where there are GPUs, over the one that is installed.
$(VENV)/triton-3.6: $(VENV)/ready-triton
	$(PIP) --no-deps --target $@ 'triton==3.6.*'
	@touch $@

$(VENV)/ready-%: $(VENV)/torch.txt setup.py constraints/model-zoo.txt constraints/peers.txt
	$(PIP) --editable '.[$*]'
	$(if $(filter test bench,$*),$(PIP) --requirement constraints/model-zoo.txt)
	$(if $(filter test bench,$*),$(PIP) --no-deps --requirement constraints/peers.txt)
	@touch $@
