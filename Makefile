# Everything runs in .venv, which the first target that needs it sets up: `make demo` and `make test` need only Python 3.11.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3 python3.11 python3.12
PROMPT ?= a large red circle to the left of a small blue square
ARGS ?=
WORKERS ?= 2

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CONSTRAINTS := requirements/constraints.txt
# A worker that has nothing left takes tests from the other; each has a share of about 3 GB of memory.
PARALLEL = --numprocesses $(WORKERS) --dist worksteal
STUBS := .venv/stubs/tensorrt_bindings/tensorrt.pyi
BUNDLE := build/shapes.bundle
# What a bundle is made of and by: a change to any of these exports it again.
BUNDLE_SOURCES := $(shell find models/shapes -type f 2>/dev/null) $(shell find export -name '*.py' -o -path '*/configs/*') \
    engines/bundle/manifest.py engines/spec.py

.PHONY: help demo test check lint cpp-asan clean distclean

help: ## list the targets
	@echo 'make demo        draw a picture from a prompt: make demo PROMPT="a small green star above a large pink cross"'
	@echo 'make test        run all tests; pytest options go into ARGS: make test ARGS="-k imports -x"'
	@echo '                 in WORKERS processes, 2 unless said otherwise; make test WORKERS=0 ARGS="--pdb" for a debugger'
	@echo 'make check       ruff, mypy and the tests that are not slow'
	@echo 'make lint        ruff and mypy only'
	@echo 'make cpp-asan test the C++ kernels built with AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make clean       remove what was built; make distclean removes .venv too'
	@echo 'PYTHON=/path/to/python3 chooses the Python that .venv is made with (3.11 or later)'

# The prompt travels as an environment variable, so that quotes and dollar signs reach the model as they were typed.
demo: export DEMO_PROMPT = $(value PROMPT)
demo: $(BUNDLE)/manifest.json
	@$(PY) -m runtime $(BUNDLE) "$$DEMO_PROMPT" --guidance 2 -o build/demo.png --force

test: .venv/.installed
	@$(PY) -m pytest $(PARALLEL) $(ARGS)

check: lint
	@$(PY) -m pytest $(PARALLEL) -m "not slow" $(ARGS)

lint: .venv/.installed $(STUBS)
	@$(PY) -m ruff check .
	@$(PY) -m mypy

# Python is not built with the sanitizer, so its runtime goes first; leaks that it would report are Python's own.
cpp-asan: .venv/.installed
	@cmake -S . -B build/cpp-asan -DLATENTRT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	@cmake --build build/cpp-asan --parallel
	@LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    LATENTRT_TEST_LIBRARY=build/cpp-asan/liblatentrt_kernels.so $(PY) -m pytest tests/kernels/cpu $(ARGS)

clean:
	rm -rf build dist *.egg-info kernels/*.so .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf .venv

$(BUNDLE)/manifest.json: .venv/.installed $(BUNDLE_SOURCES)
	@$(PY) -m export models/shapes -o $(BUNDLE) $(if $(wildcard $@),--force)

# TensorRT's types, for mypy alone: among the packages, `import tensorrt` would find them. What wrote them took `in` for the
# name of an argument, left out a default after others, and named a variable `bool`.
$(STUBS): .venv/.installed
	@$(PIP) install --quiet --no-deps --upgrade --constraint $(CONSTRAINTS) --target .venv/stubs tensorrt-stubs
	@sed -i -E 's/\<in: list\[/input: list[/; s/channel_axis: int\)/channel_axis: int = ...)/; /^bool: /d' $@

.venv/.installed: pyproject.toml setup.py CMakeLists.txt $(shell find kernels/csrc -type f 2>/dev/null) $(CONSTRAINTS)
	@if ! $(PIP) --version >/dev/null 2>&1; then \
	    for python in $(PYTHON) ''; do \
	        $${python:-false} -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo 'make: found no Python 3.11 or later ($(PYTHON)); install one, or say where: make PYTHON=/path/to/python3' >&2; exit 1; \
	    elif ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "make: $$python cannot make virtual environments (no venv or ensurepip);" \
	             'install it (Debian and Ubuntu: apt install python3-venv), or choose another: make PYTHON=/path/to/python3' >&2; exit 1; \
	    fi; \
	    echo "Setting up .venv with $$($$python --version). The first time downloads the packages and takes some minutes."; \
	    $$python -m venv --clear .venv; \
	fi
	@$(PIP) install --constraint $(CONSTRAINTS) setuptools cmake openvino
	@$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[test]'
	@touch $@
