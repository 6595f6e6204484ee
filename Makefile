# Two commands do everything: `make demo` and `make test`. Both make .venv first, if need be.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet -c constraints.txt

.PHONY: demo test clean

demo: .venv/demo
	$(PY) rho.py

test: .venv/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch numpy tiktoken datasets matplotlib
	touch $@

.venv/test: .venv/demo
	$(INSTALL) safetensors tokenizers sympy pytest hypothesis ruff transformers psutil
	touch $@

clean:
	rm -rf .venv out data
