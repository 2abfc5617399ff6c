# The few commands that a person needs. `make install` runs by itself before the others, and only when it has to.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install test test-versions lint demo models clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

test: lint
	$(BIN)/python -m pytest

# The same laws with older releases of transformers; the newest is tested by `make test`. Takes minutes for each.
test-versions:
	$(PYTHON) tests/versions.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

demo: install
	$(BIN)/prefixkv demo

# docs/models.md, measured again; a test holds it against the models.
models: install
	$(BIN)/python tests/make_model_table.py --write docs/models.md

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
