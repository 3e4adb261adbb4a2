# SPDX-License-Identifier: BSD-3-Clause
# Each target sets up what it needs in .venv; a second run only does what changed. `make gpu` uses the machine's own
# Python and torch.
PYTHON ?= python3
VENV ?= .venv
BENCH_OUT ?= build/bench/cpu.json

# For the devices that are here. Where there is none, the CPU kernels alone: the others take as long again, and none of
# them could run; FORCE_CUDA=1 compiles them all the same. `pip install .` and `make wheel`, whose results go to other
# machines, build for every architecture.
DEVICES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
ifeq ($(filter wheel,$(MAKECMDGOALS)),)
export TORCH_CUDA_ARCH_LIST ?= $(or $(DEVICES),9.0+PTX)
ifeq ($(DEVICES),)
export FORCE_CUDA ?= 0
endif
endif

BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
CLANG_FORMAT_FILES = $(shell find csrc examples -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

# Images of containers set it. Packages come without compiled modules here: with it, each process of the tests would
# compile what it imports of torch and torchvision anew, 12 s of CPU and not 5.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test cpptest bench gpu gpu-bundle wheel registers asan docs axe examples fuzz new-user format lint \
  setup clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: setup  ## train on real images for a few minutes; report in runs/demo/
	$(BIN)/python -m ssmkernels demo

# A test that hangs fails, and its process is replaced: not in pyproject.toml, because older versions of pytest do not
# know it.
END_OF_HANGS = -o faulthandler_exit_on_timeout=true

# The kernels and their C++ tests need no torch: they are compiled and run while pip installs it.
# Python tests: a process a core; threads of several processes would wait for each other's. Tests of several threads ask
# for them.
test:  ## C++ tests of the kernels, then the Python tests
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/packages cpptest
	@$(MAKE) --no-print-directory setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(END_OF_HANGS) --numprocesses auto --maxprocesses 4 --dist worksteal \
	  --durations 20 python_tests

cpptest: $(VENV)/kernels  ## C++ tests of the kernels
	PATH="$(CURDIR)/$(BIN):$$PATH" MAKEFLAGS= cmake --workflow --preset kernels

bench: setup  ## time every op beside its peers
	$(BIN)/python -m ssmkernels bench --out $(BENCH_OUT)

fuzz: setup  ## 50,000 random calls of everything public, right and wrong ones (an hour; FUZZ="--examples N --seed S")
	PYTHONPATH=python_tests:python_tests/ops OMP_NUM_THREADS=1 $(BIN)/python -m fuzz $(FUZZ)

docs examples: $(VENV)/lightning
docs: setup  ## build the site in build/docs, run the examples of README.md and docs/, check figures and links
	$(BIN)/python docs/readme.py --check
	$(BIN)/python -m sphinx -W --keep-going -n -q -E -b html docs build/docs
	$(BIN)/python docs/check_site.py build/docs
	$(BIN)/python docs/check.py

axe: setup  ## look at the pages of build/docs in Chromium, where there is one: axe-core, nothing wider than the screen
	@if command -v chromedriver >/dev/null; then $(MAKE) --no-print-directory $(VENV)/axe; fi
	$(BIN)/python docs/axe.py build/docs

examples: setup  ## run examples/ as a user does; stops at the first that fails
	@for example in examples/*.py; do \
	  echo "== $$example"; $(BIN)/python "$$example" || { echo "make examples: $$example failed" >&2; exit 1; }; \
	done

new-user: setup  ## do what README says as new users do: a fresh environment, an empty home, no network
	rm -rf build/new-user
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/new-user .
	$(BIN)/python .ci/new_user.py build/new-user/ssmkernels-*.whl

format: setup  ## format C++ and Python
	$(BIN)/clang-format -i $(CLANG_FORMAT_FILES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup  ## formatting, lint, words, types
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMAT_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --dictionary=- --dictionary=.ci/words.txt
	$(BIN)/mypy

setup:  ## .venv with pinned packages and the built library
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/packages $(VENV)/kernels
	@$(MAKE) --no-print-directory $(VENV)/built

$(VENV)/tools: constraints.txt
	@echo "== $(VENV): a virtual environment"
	$(PYTHON) -m venv $(VENV)
	$(PIP) cmake ninja pybind11 setuptools uv wheel
	@touch $@

# Extras that are not here from the start. Lightning brings torchmetrics, which Fabric then imports with all of
# torchvision: three seconds at every start of a trainer. pynndescent, the peer, brings a compiler.
LATER = lightning peers

# uv takes a third of pip's processor time for them, and pip where uv, which does not read pip's settings, cannot have
# one. Modules are compiled when they are first imported: most of what lies in torch never is.
$(VENV)/packages: pyproject.toml $(VENV)/tools
	@echo "== torch, torchvision and what trainers, benchmarks and checks need (one to three minutes, 6 GB)"
	$(BIN)/python -c "from setuptools.config.pyprojecttoml import read_configuration as read; \
	  project = read('pyproject.toml', expand=False)['project']; \
	  extras = project['optional-dependencies']; [extras.pop(name) for name in '$(LATER)'.split()]; \
	  print(*project['dependencies'], *sum(extras.values(), []), sep='\n')" \
	  >$(VENV)/requirements.txt
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -r $(VENV)/requirements.txt || \
	  $(PIP) --no-compile -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/lightning: $(VENV)/packages
	$(PIP) --no-compile pytorch-lightning
	@touch $@

# axe-core comes inside a package that drives browsers by playwright, which is not needed: selenium drives this one.
$(VENV)/axe: $(VENV)/packages
	$(PIP) selenium
	$(PIP) --no-deps axe-playwright-python
	@touch $@

$(VENV)/kernels: $(VENV)/tools $(SOURCES)
	@echo "== the kernels (about a minute, two with CUDA; less where little changed)"
	$(BIN)/python setup.py build_clib
	@touch $@

$(VENV)/built: $(VENV)/packages $(VENV)/kernels
	@echo "== the Python module"
	$(BIN)/python setup.py build_ext --inplace
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# No network and no virtual environment: the machine's own Python and torch, and the bundle where there is one. Every
# step has its time box; all of them together nine minutes. STEPS=smoke,speed runs those.
gpu:  ## build, check and measure on this machine's GPU, with its own torch; results in build/gpu/
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or \
	  sys.exit('make gpu: torch %s sees no CUDA device' % torch.__version__)"
	@$(PYTHON) -m bench.gpu $(if $(STEPS),--steps $(STEPS))

# For a GPU machine without a network, which has Python, torch and nvcc of its own. The oldest torch that is supported
# gives the headers.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= 2.11.0
GPU_WHEELS = pytorch-metric-learning pytest-xdist execnet hypothesis sortedcontainers
gpu-bundle: export TORCH_CUDA_ARCH_LIST := 9.0
gpu-bundle:  ## build/gpu-bundle/: _C for the GPU machine (GPU_PYTHON, GPU_TORCH, sm_90), and wheels of what it may lack
	$(GPU_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q --no-deps torch==$(GPU_TORCH)
	.venv-gpu/bin/python -m pip install -q -c constraints.txt cmake ninja pybind11 setuptools wheel
	rm -rf build/gpu-bundle
	FORCE_CUDA=1 .venv-gpu/bin/python setup.py build_ext --build-lib build/gpu-bundle
	.venv-gpu/bin/python -m pip download -q --no-deps -c constraints.txt --dest build/gpu-bundle/wheels $(GPU_WHEELS)
	.venv-gpu/bin/python -m bench.gpu.bundle

wheel: setup  ## dist/: a manylinux_2_28 wheel for each Python that is here (WHEEL_PYTHONS="PATH ..." for those)
	.ci/wheels

# All of it anew: ptxas reports what it compiles. Instructions are counted where there is cuobjdump.
registers: $(VENV)/tools  ## registers, spills and instructions of the CUDA kernels on sm_90; fails where one spills
	export PATH="$(CURDIR)/$(BIN):$$PATH:/usr/local/cuda/bin" && \
	  cmake -G Ninja -S . -B build/registers -DSSM_CUDA=ON -DSSM_PTXAS_VERBOSE=ON -DCMAKE_CUDA_ARCHITECTURES=90 && \
	  { cmake --build build/registers --target kernels_cuda --clean-first >build/registers/ptxas.log 2>&1 || \
	    { tail build/registers/ptxas.log; exit 1; }; } && \
	  python bench/registers.py build/registers/ptxas.log \
	    $$(command -v cuobjdump >/dev/null && echo --objects build/registers)

# The package by links to this one, with a sanitised _C in its place. Python is not built with AddressSanitizer, which
# has to come first.
ASAN = build/bindings-asan
asan: setup  ## call the operators below their checks, 300 times each, under AddressSanitizer
	mkdir -p $(ASAN) && cp -rsf "$(CURDIR)/ssmkernels" $(ASAN)
	rm -f $(ASAN)/ssmkernels/_C.*.so $(ASAN)/ssmkernels/_build_info.json
	export PATH="$(CURDIR)/$(BIN):$$PATH" && cmake --preset kernels-asan && \
	  cmake --build --preset kernels-asan --target kernels && \
	  cmake --preset bindings-asan -DPython_EXECUTABLE="$$(command -v python)" \
	    -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" && \
	  cmake --build --preset bindings-asan
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(ASAN) SSMKERNELS_RAW_EXAMPLES=300 $(BIN)/pytest python_tests/ops/test_raw_operators.py

clean:  ## remove everything that was built or installed here
	rm -rf $(VENV) .venv-* build dist *.egg-info ssmkernels/_C.*.so ssmkernels/_build_info.json ssmkernels/cpp
	rm -rf .pytest_cache .mypy_cache .ruff_cache
