# Both `make demo` and `make test` set up what they need in .venv, on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/selftest-cuda

.PHONY: demo test slow fuzz compat gpu docs lint types smoke hooks clean

demo: $(VENV)/.ready
	$(BIN)/antransformer demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations 15 --timeout 900

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.ready
	ANTRANSFORMER_FUZZ_CASES=10000 $(BIN)/python -m pytest -n auto tests/test_fuzz.py

# With the oldest and the newest supported torch and transformers, each in an environment of its own.
compat:
	PYTHON=$(PYTHON) .ci/compat $(ARGS)

# With the torch of $(PYTHON), which must be built for CUDA; that of .venv may not be. Continues where it stopped.
gpu:
	PYTHONPATH=src $(PYTHON) -m antransformer selftest --device cuda --out $(OUT) $(ARGS)

# Pages open from the file system too, but the search needs a web server.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "view the site at http://localhost:8000: $(BIN)/python -m http.server -d build/site"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

smoke: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" bash .ci/smoke

# Lint and types before every commit, from .venv and without a network.
hooks: $(VENV)/.ready
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# Here, since processes write no bytecode where PYTHONDONTWRITEBYTECODE is set, and each compiles torch again. On all
	@# cores, while pip compiles on one. Some packages hold templates that are not valid Python.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib src > /dev/null 2>&1 || true
	@touch $@
