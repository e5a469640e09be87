VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEVICE ?= cuda
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint docs benchmarks gpu clients wheel install clean

demo: $(INSTALLED)  ## the main job on the shipped data: compare policies, print the table
	$(BIN)/unlearn-gym compare --policies static:0.1 static:0.5 static:0.9 variational:pathwise variational:variance ppo \
		--seeds 3 --jobs 2 --out runs/demo

test: $(INSTALLED)  ## the tests, offline, in up to four processes of one thread
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## the documentation site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmarks: $(INSTALLED)  ## pytest-benchmark files, for comparing two versions on one machine
	$(BIN)/python -m pytest tests/benchmarks/bench_*.py

gpu: $(INSTALLED)  ## tests and measurements on a CUDA device; DEVICE=cpu checks the check itself
	UNLEARN_GYM_DEVICE=$(DEVICE) $(BIN)/python -m pytest tests/test_gpu.py
	$(BIN)/unlearn-gym bench --items 1 2 4 6 --device $(DEVICE) --out runs/gpu

clients: $(INSTALLED)  ## RL Baselines3 Zoo, CleanRL, TorchRL and RLlib, each in a virtual environment of its own
	sh tests/check_clients.sh $(BIN)/python

wheel: $(INSTALLED)  ## build the wheel and use it away from the checkout
	$(BIN)/python -m build --wheel --outdir dist .
	sh tests/check_wheel.sh $(BIN)/python dist

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[metrics,agents,distributed,diffusers,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
