# make setup | demo | test | test-all | lint | typecheck | docs | bench-quick | chaos.  Every target installs what it needs into $(VENV).
VENV ?= .venv
OUT ?= out/demo
PYTEST_ARGS ?=
CHAOS_ARGS ?=
# Test files run in so many processes, each with a Ray of its own: much of a Ray test is waiting. The slow files come
# first. One thread each, or the threads of one process would spin while the other computes.
TEST_PROCESSES ?= 2
# compare_oml.py and quality.py need an environment or a catalogue of their own.
SMOKE := benchmarks/pairs.py benchmarks/scale.py benchmarks/distillation.py benchmarks/gpu.py
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start hundreds of Python processes: each would compile the package anew where this variable is set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-all lint format typecheck docs bench-quick chaos clean

setup: $(INSTALLED)

# The fallback is for Debian, whose python3 without the package python3-venv makes environments only without pip.
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; python=""; \
	for candidate in $(PYTHON) python3 python3.12 python3.11; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "make setup: needs Python 3.11 or 3.12; install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 2; fi; \
	echo "Installing into $(VENV) with $$($$python --version) ..."; \
	$$python -m venv $(VENV) >/dev/null 2>&1 || \
	  { $$python -m venv --clear --without-pip $(VENV) && $$python -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python jobs/demo.py --out $(OUT)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: setup
	$(PYTEST) --durations 15 $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup
	$(BIN)/python docs/reference.py out/docs

bench-quick: setup
	@set -e; for script in $(SMOKE); do echo "== $$script --quick"; $(BIN)/python $$script --quick; done

# Faults in the middle of real jobs; CHAOS_ARGS=--quick leaves Ray out.
chaos: setup
	$(BIN)/python benchmarks/chaos.py $(CHAOS_ARGS)

clean:
	rm -rf $(VENV) out
