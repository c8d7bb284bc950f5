# Two commands do everything: `make demo` and `make test`. Each makes the environment it needs in
# .venv; a second run installs nothing unless pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check unit slow clean

demo: $(VENV)/.runs
	$(BIN)/loralab compare demo --output runs/demo

test: check unit

check: $(VENV)/.tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

# One torch thread a worker: two workers share the cores without fighting for them.
unit: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

slow: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

$(VENV)/.runs: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.tests: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[test]"
	@touch $@ $(VENV)/.runs

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
