# Two commands set everything up: `make demo` and `make test`. Both make a virtual environment of their own.
PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv-test
PEERS := .venv-peers
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench golden peers clean

demo: $(DEMO)/installed
	$(DEMO)/bin/kvsim sweep experiments/demo.toml --jobs 2 -o runs/demo
	$(DEMO)/bin/kvsim sweep experiments/offload.toml --jobs 2 -o runs/offload

test: $(TEST)/installed
	$(TEST)/bin/python -m pytest -n auto --maxprocesses 4

check: $(TEST)/installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports

bench: $(TEST)/installed
	for f in benchmarks/*.py; do echo "== $$f"; $(TEST)/bin/python $$f || exit 1; done

golden: $(TEST)/installed
	$(TEST)/bin/python -m tests.golden.make

# Other implementations have pins of their own, hence an environment of their own and no constraints of ours.
peers: $(PEERS)/installed
	$(PEERS)/bin/python -m pytest tests/peers --tables docs/peers.md

$(DEMO)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install $(PIP_FLAGS) .
	touch $@

$(TEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) -e ".[capture,learn,dask,dev]"
	touch $@

$(PEERS)/installed: pyproject.toml tests/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt -e .
	touch $@

clean:
	rm -rf $(DEMO) $(TEST) $(PEERS) runs build dist *.egg-info
