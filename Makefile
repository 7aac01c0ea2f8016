# make demo | make test | make lint | make effects; each installs what it needs into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

.PHONY: demo test lint format effects test-floor clean

demo: $(VENV)/installed
	$(BIN)/vlmfix demo

test: $(VENV)/installed
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# docs/effects.md; see there.
effects: $(VENV)/installed
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m vlmfix.evals.effects \
		--out build/effects --page docs/effects.md $(ARGS)

# pip comes from $(PYTHON), so that a system Python without ensurepip will do.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install pip --editable '.[dev]'
	touch $@

# The oldest versions that pyproject.toml allows, in an environment of their own.
test-floor: .venv-floor/installed
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -n $(JOBS) $(ARGS)

.venv-floor/installed: pyproject.toml
	test -x .venv-floor/bin/python || $(PYTHON) -m venv --without-pip .venv-floor
	$(PYTHON) .ci/floor.py > .venv-floor/constraints.txt
	$(PYTHON) -m pip --python .venv-floor/bin/python install --constraint .venv-floor/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-floor build dist demo
