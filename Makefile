# Two commands do everything: `make demo` and `make test`. Both make .venv first, if need be.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet -c constraints.txt

.PHONY: demo test results clean

demo: .venv/demo
	$(PY) rho.py
	$(PY) results/plots.py out/demo
	$(PY) results/tokens_page.py out/demo

test: .venv/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

# Everything that is published: 8 hours on two cores.
results: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash results/run.sh
	$(PY) results/tables.py
	$(PY) results/plots.py

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch numpy tiktoken datasets matplotlib
	touch $@

.venv/test: .venv/demo
	$(INSTALL) safetensors tokenizers math-verify pytest pytest-xdist hypothesis ruff transformers
	touch $@

clean:
	rm -rf .venv out data
