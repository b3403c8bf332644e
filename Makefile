# `make train` and `make test` set everything up the first time and reuse it afterwards.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Further flags for the command: make train ARGS="--skip-scale ls --run runs/ls"
ARGS ?=
# Of make gpu: first, second, or one of their parts.
PART ?= first

.PHONY: help install train test test-fast test-all test-oldest test-oldest-triton soak lint format bench kernel-report docs release-check gpu clean

help:
	@echo "make train      train the embedded default on handwritten digits, minutes on two CPU cores"
	@echo "make test       all tests"
	@echo "make test-fast  the tests that take seconds"
	@echo "make test-all   also the exhaustive ones, which take minutes and tens of gigabytes"
	@echo "make test-oldest  operators and models on the oldest torch and Triton, without any other package (5 GB)"
	@echo "make test-oldest-triton  kernels compile for a GPU by the oldest Triton (190 MB)"
	@echo "make soak       SOAK_KILLS=200 kills of training runs at random moments, each run compared with an undisturbed one"
	@echo "make lint       ruff and pyright"
	@echo "make format     let ruff rewrite what lint complains about"
	@echo "make bench      benchmarks on this machine; SCALELONG_RECORD=1 appends their rows to bench/results"
	@echo "make kernel-report  what the GroupNorm kernels cost an H100, read from their machine code; writes docs/kernel-report.md"
	@echo "make gpu        on a machine with a GPU, with its own Python, without network: PART=first (380 s) steps, norms, attention,"
	@echo "                products, tests; PART=second (300 s) torch.compile; PART=tuning; SCALELONG_DRY_RUN=1 tries it on a CPU"
	@echo "make docs       the documentation as a site, site/index.html; fails on a broken link"
	@echo "make release-check  the wheel and the sdist, each tried where only the core and Pillow are; leaves them in dist/"
	@echo "make install    only set up $(VENV)"

# Builds the native library again only where its sources are newer.
NATIVE := kernels/native/libscalelong_native.so
NATIVE_SOURCES := CMakeLists.txt $(wildcard kernels/native/*.h kernels/native/*.cpp)

install: $(VENV)/.installed $(NATIVE)

$(NATIVE): $(NATIVE_SOURCES) | $(VENV)/.installed
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# torch first, at exactly the tested version: a looser request pulls whatever is newest.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ScaleLong needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt --upgrade pip setuptools wheel cmake
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[train,dev]"
	@touch $@

train: install
	$(BIN)/python -m scalelong.train digits-uvit $(ARGS)

# Most tests run TEST_WORKERS at a time, those that nothing may run beside after them. ARGS may select none of either (5).
# Two more than there are cores, as many tests wait for processes that they have started; at most 8.
TEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 6 ? n + 2 : 8)))

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal --durations 20 -m "not alone and not exhaustive" $(ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest -m "alone and not exhaustive" $(ARGS) || [ $$? = 5 ]

test-fast: install
	$(BIN)/python -m pytest -m "not slow and not exhaustive" $(ARGS)

test-all: install
	$(BIN)/python -m pytest -m "" $(ARGS)

# By hand and before each release: the CUDA libraries of that wheel take gigabytes. Beside torch, triton, numpy and
# safetensors there is only what tests and benches need. The interpreter of Triton 3.6 fails with numpy 2.4.
OLDEST ?= .venv-oldest
OLDEST_TESTS := $(wildcard $(addprefix tests/test_,*norm*.py *linear*.py *conv*.py attention*.py skip_scale*.py u*.py \
	adm*.py dit*.py backbone*.py features.py parameter_kinds.py house.py host.py launches.py nvidia*.py kernel_budget.py machine_code.py bench_*.py gpu.py))

$(OLDEST)/.installed:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q torch==2.11.0 triton==3.6.0 'numpy<2.4' safetensors \
		pytest pytest-timeout pytest-xdist pytest-benchmark hypothesis
	@touch $@

test-oldest: $(OLDEST)/.installed $(NATIVE)
	PYTHONPATH=src $(OLDEST)/bin/python -m pytest -p no:cacheprovider --timeout 600 $(OLDEST_TESTS) $(ARGS)

# The oldest Triton (190 MB) beside this torch: by both, kernels must compile for a GPU.
OLDEST_TRITON ?= .venv-triton
COMPILED_TESTS := $(wildcard tests/test_*_aot.py) tests/test_add_layer_norm_triton.py

$(OLDEST_TRITON)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(OLDEST_TRITON) triton==3.6.0
	@touch $@

test-oldest-triton: install $(OLDEST_TRITON)/.installed
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -p no:cacheprovider -n 2 -k "not interpreter" $(COMPILED_TESTS) $(ARGS)

# Counts are kept in SOAK_FOLDER: interrupted, the same command goes on.
SOAK_KILLS ?= 200
SOAK_SEED ?= 0
SOAK_FOLDER ?= runs/soak

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(SOAK_FOLDER) --kills $(SOAK_KILLS) --seed $(SOAK_SEED)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCH := -m pytest bench -o python_files='bench_*.py' --benchmark-only -q --stop-after 540

bench: install
	$(BIN)/python $(BENCH) $(ARGS)

kernel-report: install
	$(BIN)/python -m scalelong.bench.kernel_report --write

# Without torch: what documents the public functions reads their sources. With -q MkDocs would count no warnings.
DOCS ?= .venv-docs
DOCS_NEED := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c '$(DOCS_NEED)' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install -q -c constraints.txt -r $(DOCS)/requirements.txt
	@touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict $(ARGS)
	@echo "to look at: site/index.html"

release-check: install
	$(BIN)/python tests/release.py $(ARGS)

gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m scalelong.bench.gpu $(PART) $(ARGS)

clean:
	rm -rf $(VENV) $(DOCS) $(OLDEST_TRITON) build dist site *.egg-info src/*.egg-info $(NATIVE)
