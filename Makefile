# `make demo` and `make test` work on a fresh machine with nothing but Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint clean

$(VENV)/core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[torch,dev]"
	touch $@

demo: $(VENV)/core
	$(VENV)/bin/lamina demo -o out/demo

test: $(VENV)/dev
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/dev
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) out
