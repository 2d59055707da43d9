# One command each for everything that is done with this repository; the same here and in CI.
#
# The first target that needs it makes .venv with the versions of constraints.txt. Another pip source is chosen as always,
# with PIP_INDEX_URL or pip.conf; an interpreter with `make PYTHON=python3.12 ...`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# What gpu-test runs on; another environment that has all that it needs: make GPU_PYTHON=python3 gpu-test
GPU_PYTHON := $(BIN)/python
STAMP := $(VENV)/.loraplane-installed
PROTOS := $(sort $(wildcard protos/loraplane/v1/*.proto))
RUN_BUF := npx --yes --loglevel=error --package @bufbuild/buf@1.75.0 -- buf
# $(call generate,DIR) writes the stubs under DIR.
generate = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I. --python_out=$(1) --mypy_out=quiet:$(1) \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)
PACKAGES := adapter_store controlplane dataplane kernels protos

.PHONY: help setup demo test lint check-python check-protos check-stubs protos report evaluation gpu-test clean

help:  ## Show this.
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## Make .venv, if it is not there or constraints.txt changed.

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
		python=$$(for name in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
			if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$name"; break; fi; done); \
		if [ -z "$$python" ]; then \
			echo "loraplane needs Python 3.11 or newer, and none is on PATH (python3 is $$(python3 -V 2>&1))." \
				"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
		echo "making $(VENV) with $$($$python -V); the first time takes minutes"; \
		"$$python" -m venv $(VENV); }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Serve the example model and watch its adapters answer in one batch, side by side.
	@$(BIN)/python -m examples.demo

test: lint  ## Everything that must pass before a commit: lint, then all tests.
	@$(BIN)/python -m pytest

lint: check-python check-protos check-stubs  ## Format, lint and types; protos; stubs that do not match their protos.

check-python: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# buf comes from npm; without npx its checks are skipped, and say so. What a release has promised stays compatible: before
# the first tag there is nothing to compare with.
check-protos:
	@if ! command -v npx >/dev/null; then \
		echo "buf lint and buf breaking SKIPPED: npx is not on PATH" >&2; \
	else \
		$(RUN_BUF) lint; \
		if tag=$$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null); then \
			$(RUN_BUF) breaking --against ".git#tag=$$tag"; fi; \
	fi

check-stubs: $(STAMP)
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(call generate,$$out); \
	ls -d protos/loraplane/v1/*_pb2* | sort >$$out/committed; \
	(cd $$out && ls -d protos/loraplane/v1/*_pb2* | sort) >$$out/generated; \
	diff -u $$out/committed $$out/generated && \
	while read -r stub; do diff -u "$$stub" "$$out/$$stub" || exit 1; done <$$out/generated || { \
		echo "stubs do not match protos/loraplane/v1; run: make protos" >&2; exit 1; }

protos: $(STAMP)  ## Generate the Python stubs from protos/ again.
	@$(call generate,.)

report: $(STAMP)  ## Write docs/performance.md from benchmarks/results.
	@$(BIN)/python -m benchmarks.report

evaluation: $(STAMP)  ## Measure the service on this machine's GPU, about half an hour on an H200; then: make report
	@$(BIN)/python -m benchmarks.evaluation

# Not after $(STAMP), which might bring another torch into an environment that has the right one.
gpu-test:  ## The tests that need a CUDA device, some of them under compute-sanitizer as well.
	@PYTHON="$(GPU_PYTHON)" .ci/gpu-test

clean:  ## Remove what the other targets made, .venv included.
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .state
	find $(PACKAGES) tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
