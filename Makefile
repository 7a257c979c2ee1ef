# The only door. `make help` lists what is behind it.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
PROTO_FILES := $(wildcard protos/fabula/*/v1/*.proto)
PROTO_STAMP := protos/gen/.generated
BUF_VERSION := 1.75.0
BUF := $(VENV)/node_modules/.bin/buf

# No weights, data or telemetry travel at run time; tests and tools inherit this.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup protos protos-release demo up down status doctor check test test-fast bench bench-frame bench-load bench-characters toon-pack eval-toon sheet lock clean

help: ## List every target
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP) $(PROTO_STAMP) ## Make the virtual environment with pinned packages and the generated protobufs

# torch goes first and with its own dependencies: where only its CUDA build exists it needs them. Everything else is
# pinned and installed without dependencies, so that nothing drifts.
$(SETUP): requirements/cpu.lock pyproject.toml protos/pyproject.toml clients/python/pyproject.toml clients/cli/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Fabula needs Python 3.11: install it, or say where it is with 'make PYTHON=/path/to/python3.11 …'"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(setuptools|wheel)==' requirements/cpu.lock)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^torch==' requirements/cpu.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	mkdir -p protos/gen
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . -e protos -e clients/python -e clients/cli
	$(BIN)/python services/runtime/torchvision_operators.py
	@touch $@

protos: $(PROTO_STAMP) ## Generate the protobuf code

$(PROTO_STAMP): $(SETUP) $(PROTO_FILES)
	rm -rf protos/gen/fabula && mkdir -p protos/gen
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos/gen --pyi_out=protos/gen --grpc_python_out=protos/gen $(PROTO_FILES:protos/%=%)
	@touch $@

protos-release: $(BUF) ## Record today's contracts as the ones `make check` compares with
	cd protos && ../$(BUF) build -o released.binpb

demo: setup ## Continue the shipped first frames into stories and say where they are
	$(BIN)/fabula demo --out demo-stories

up: setup ## Start the services
	$(BIN)/fabula up

down: ## Stop the services
	$(BIN)/fabula down

status: ## Say what runs and how it is
	$(BIN)/fabula status

doctor: setup ## Check this machine and say how to mend what is wrong
	$(BIN)/fabula doctor

check: setup $(BUF) ## Lint, types, import contracts, proto contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy services training clients/python/fabula_client clients/cli/fabula_cli
	$(BIN)/lint-imports
	cd protos && ../$(BUF) lint && ../$(BUF) format -d --exit-code && ../$(BUF) breaking --against released.binpb

$(BUF): $(SETUP)
	@command -v npm >/dev/null || { echo "make check needs npm, for buf (make demo and make test do not)"; exit 1; }
	npm install --silent --no-package-lock --no-fund --no-audit --prefix $(VENV) @bufbuild/buf@$(BUF_VERSION)
	@touch $@

test-fast: setup ## Unit and contract tests
	$(BIN)/python -m pytest tests/unit tests/contract

test: setup ## Every test: unit, contract, end-to-end, chaos
	$(BIN)/python -m pytest tests/unit tests/contract tests/e2e tests/chaos

bench-frame: setup ## Compare the frame engine with what else draws story frames (more than an hour)
	$(BIN)/python -m tests.bench.frame

bench-characters: setup ## Compare ways to teach new characters (hours; resumable; BUDGET=minutes, hours or full)
	$(BIN)/python -m training.evaluation.newepisode --budget $(or $(BUDGET),hours)

bench-load: setup ## Measure the time and memory of reading full-size packs (up to 9 GB of scratch space)
	$(BIN)/python -m tests.bench.load

bench: setup ## Measure cold start, memory, story time and edge overhead
	$(BIN)/python -m tests.bench

toon-pack: setup ## Train the toon pack again from nothing (resumable)
	$(BIN)/python -m training.toon_pack

eval-toon: setup ## Measure the toon pack; the last line is one JSON object
	$(BIN)/python -m training.evaluation.toon

sheet: setup ## Draw contact sheets of the toon world
	$(BIN)/python -m training.toon.sheet

lock: ## Resolve requirements/*.in again in a scratch environment and rewrite the lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet wheel $$(grep -hE '^torch==' requirements/cpu.in)
	build/lock/bin/python -m pip install --quiet -r requirements/cpu.in -r requirements/dev.in
	{ echo "# Every package of the CPU environment, pinned. Made by \`make lock\`; installed with --no-deps after torch."; \
	  build/lock/bin/python -m pip freeze --all | grep '==' | sed 's,+cpu$$,,' | grep -viE '^(pip|torchaudio|torchcodec|nvidia-.*)==' | sort -f; } > requirements/cpu.lock

clean: ## Remove what setup, tests and demo made (asks nothing, keeps your stories in FABULA_HOME)
	rm -rf $(VENV) protos/gen build demo-stories bench-results .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
