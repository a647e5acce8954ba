# Every target is one call of tools/start.py, which makes .venv the first time and skips that the next.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
endif
START := $(PYTHON) tools/start.py
.DEFAULT_GOAL := help
.PHONY: help dev tour lab test nightly mutants lint format smoke book clean

help:     ## this list
	@grep -E '^[a-z]+: .*##' Makefile | sed 's/:.*## /\t/' | expand -t 10

tour:     ## train a small GPT and read what it writes; make tour ARGS="--minutes 1"
	@$(START) tour $(ARGS)

lab:      ## open the chapters in JupyterLab
	@$(START) lab $(ARGS)

test:     ## run every chapter and test; make test ARGS="-k cache" those with the word
	@$(START) test $(ARGS)

dev:      ## set up .venv with all that the other targets need
	@$(START) dev

lint:     ## ruff, clean notebooks, the laws of the book, a fresh README
	@$(START) run ruff check
	@$(START) run ruff format --check
	@$(START) run python tools/clean.py --check
	@$(START) run python tools/readme.py --check
	@$(START) run python -m pytest -q tests/test_layers.py

format:   ## lay out the code in notebooks, tests and tools, 100 columns; clean notebooks
	@$(START) run ruff check --fix -q
	@$(START) run ruff format
	@$(START) run python tools/clean.py

smoke:    ## a tour of twelve seconds in a folder that is thrown away
	@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && LLM_LAB_HOME="$$home" $(START) tour --minutes 0.2 $(ARGS)

book:     ## run the chapters, save their pictures, write llm_lab/ and README.md
	@$(START) run python tools/export.py
	@$(START) run python tools/book.py $(ARGS)
	@$(START) run python tools/readme.py

nightly:  ## every test, the slow ones too
	@$(START) nightly $(ARGS)

mutants:  ## break the promises of a run on purpose: each break must turn a test red
	@$(START) run python tools/mutants.py $(ARGS)

clean:    ## remove what the tools made; .venv, data and models stay
	@rm -rf build dist *.egg-info _proc _docs .pytest_cache .ruff_cache nbs/sidebar.yml nbs/.quarto
	@find llm_lab nbs tests tools experiments \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} + 2>/dev/null || true
