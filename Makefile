# make demo    set up .venv and watch a tiny model learn, on a laptop CPU
# make test    set up .venv and run every test this machine can run
# make quick   the tests without the slow ones
# make native  build the C++ kernels (demo and test do it where a compiler is at hand)
# make lint    ruff (rules and format) and mypy
# make format  let ruff rewrite what it can
# make clean   remove .venv and caches

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that run tests side by side; 0 is none beside pytest itself, for a debugger.
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
PYTEST := $(BIN)/python -m pytest -n $(JOBS)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c .ci/constraints.txt

.PHONY: demo test quick native lint format venv clean
.DEFAULT_GOAL := test

demo: $(BUILT)
	$(BIN)/python -m tdm_r1 demo $(ARGS)

test: $(BUILT)
	$(PYTEST) $(ARGS)

quick: $(BUILT)
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(READY)

# DeepSpeed comes as source and imports torch while it is built, so torch goes in first and the
# second install builds without isolation. DS_BUILD_OPS=0: no ops are compiled ahead of time.
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: '$(PYTHON)' is not Python 3.10 or newer; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PIP_INSTALL) torch setuptools wheel
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

native: $(READY)
	$(BIN)/cmake -S . -B build/native -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/native --parallel 2

# Without a compiler nothing breaks: the reference ops serve, slower.
$(BUILT): $(READY) CMakeLists.txt $(wildcard csrc/*)
	@$(MAKE) --no-print-directory --silent native > $(VENV)/native.log 2>&1 || \
	    echo "note: the C++ kernels were not built, the reference ops serve; see $(VENV)/native.log" >&2
	@touch $@

clean:
	rm -rf $(VENV) build kernels/tdm_kernels/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
