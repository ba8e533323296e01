# The environment lies in .venv; it is made anew when requirements.txt changes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mlflow run . --env-manager local

# Bytecode is written, whatever the environment says: every process would compile what it imports anew, 15 seconds long.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-all check ui dashboard results audit clean

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
# Not compiled ahead: that takes longer than all that is ever imported.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
# The package index's auto_LiRPA asks for an old torch; rampart.bounds.compat makes it run on ours.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps auto-LiRPA==0.3
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable .[ray]
	touch $(READY)

# The whole study on the embedded dataset.
demo: setup
	$(RUN) -P profile=quick

# A worker a core; each file's tests stay together.
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadfile --durations 15

test: check
	$(PYTEST)

test-all: check
	$(PYTEST) -m "slow or not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The MLflow UI on the store that runs go to; where that is a server, which has its own, its address alone is told. The store
# is made ready first: a server that creates it would give the default experiment a location that only servers can write to.
ui: setup
	@store=$$($(BIN)/python -m rampart.tracking.ui) && case "$$store" in \
	  http*) ;; \
	  *) MLFLOW_BACKEND_STORE_URI=$$store $(BIN)/mlflow ui --no-serve-artifacts --port $${PORT:-5000} ;; \
	esac

# Optuna's own view of the studies that tune keeps.
dashboard: setup
	$(BIN)/optuna-dashboard $${STORAGE:-sqlite:///tuning.db} --port $${PORT:-8080}

# The tables of these documents from the evidence in results/.
results: setup
	$(BIN)/python -m rampart.reports.document RESULTS.md README.md docs/recipes.md docs/speed.md

# What the package advisories say of what is installed.
audit: setup
	$(BIN)/pip-audit --local --skip-editable --progress-spinner off

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -exec rm -rf {} +
