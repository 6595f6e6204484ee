# Two commands do everything: `make demo` and `make test`. Both make .venv first, if need be.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test clean

demo: .venv/installed
	$(PY) rho.py

test: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt torch numpy tiktoken datasets \
		matplotlib safetensors tokenizers sympy pytest hypothesis ruff transformers psutil
	touch $@

clean:
	rm -rf .venv out data
