# Everything is installed into .venv, and again only when a requirements file has changed.
#
#   PYTHON=python3.12                      the Python to create .venv with
#   ARGS="--config.train.num_steps=200"    flags for the script (train, bench) or for pytest (test)

MAKEFLAGS += --no-builtin-rules
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup train bench results test test-all lint docs

ARGS ?=
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python)

venv := .venv
python := $(venv)/bin/python
# Huge pages spare large arrays page faults; where there is no glibc, nothing reads the variable.
script := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(python) -m
# A file's tests share what they have compiled, so they run in one process.
pytest := MPLBACKEND=Agg HF_HUB_OFFLINE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false \
	$(python) -m pytest -q -n 2 --dist loadfile
# Compiling takes most of the tests' time, and half as long where little is optimised.
quick := JAX_DISABLE_MOST_OPTIMIZATIONS=1

noise := /already satisfied|^Collecting|^Looking in|━/d
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="..." passes flags on: make train ARGS="--config.train.num_steps=200"'

setup: $(venv)/.installed-requirements  ## create .venv and install what the scripts need
	@echo "$(venv) holds all that requirements.txt names."

train: $(venv)/.installed-requirements  ## train the default model; resumes where it was interrupted
	$(script) experiments.train $(ARGS)

bench: $(venv)/.installed-requirements  ## time what the README's tables claim
	$(script) experiments.benchmark $(or $(ARGS),train)

results: $(venv)/.installed-requirements  ## write the README's table of studies from results/
	$(script) experiments.results

test: $(venv)/.installed-requirements-test  ## run the tests, except those that `make test-all` adds
	$(quick) $(pytest) -m "not slow and not oracle and not browser" $(ARGS)

test-all: $(venv)/.installed-requirements-docs
test-all: $(venv)/.installed-requirements-browser
test-all: $(venv)/.installed-requirements-oracle  ## run all tests: slow, against PyTorch, in a browser
	$(pytest) $(ARGS)

lint: $(venv)/.installed-requirements-test  ## check the code's format, and for common mistakes
	$(python) -m ruff format --check
	$(python) -m ruff check

docs: $(venv)/.installed-requirements-docs  ## write the guides and the reference to site/
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict $(ARGS)

# --- Installing: .venv/.installed-X is as old as the last installation of X.txt -------------------

$(venv)/.installed-requirements-test: requirements.txt
$(venv)/.installed-requirements-oracle: | $(venv)/.installed-requirements-test

$(venv)/.installed-%: %.txt | $(venv)/bin/pip
	@echo "Installing $< into $(venv); the first time this takes a minute or more."
	@set -o pipefail; $(python) -m pip install -r $< | sed -E '$(noise)' || { \
		echo; \
		echo "error: the installation failed; pip says above why. Is there a network connection,"; \
		echo "and room on the disk? The same command tries again; rm -rf $(venv) starts afresh."; \
		exit 1; } >&2
	@touch $@

# pip comes into a new environment last: where it is missing, there is none, or half of one.
$(venv)/bin/pip:
	@for candidate in $(PYTHONS); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "error: found no Python 3.11 or newer (tried: $(PYTHONS))."; \
		echo "Get one from https://www.python.org/downloads, or name yours: make PYTHON=/path/to/python"; \
		exit 1; \
	fi >&2; \
	echo "Creating $(venv) with $$("$$found" --version), $$(command -v "$$found")"; \
	"$$found" -m venv $(venv) || { \
		echo "error: could not create $(venv). On Debian or Ubuntu: sudo apt install python3-venv"; \
		exit 1; } >&2
