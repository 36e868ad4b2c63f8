# The commands of .ci/run, one by one. BIN is the folder of the environment's programs.
BIN ?= .venv/bin

.PHONY: help check test slow docs diagrams

help:
	@echo "make check     lint, format and types"
	@echo "make test      first test suite"
	@echo "make slow      end-to-end tests"
	@echo "make docs      documentation site in site/ (extra docs)"
	@echo "make diagrams  redraw docs/images/*.svg"

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test:
	$(BIN)/pytest

slow:
	$(BIN)/pytest -m slow

docs:
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

diagrams:
	$(BIN)/python docs/diagrams.py
