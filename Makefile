# Two commands do everything: `make demo` and `make test`. Both make .venv first, if need be.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet -c constraints.txt

.PHONY: demo test results clean

demo: .venv/demo
	$(PY) rho.py

test: .venv/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

# Every published run again, two single-threaded ones at a time: hours. See results/figures.py.
results: .venv/demo
	$(PY) prepare_data.py
	mkdir -p out && $(PY) results/figures.py commands | tr '\n' '\0' > out/jobs
	PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 xargs -0 -n1 -P2 sh -c < out/jobs
	$(PY) results/figures.py collect
	$(PY) results/figures.py

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch numpy tiktoken datasets matplotlib
	touch $@

.venv/test: .venv/demo
	$(INSTALL) safetensors tokenizers sympy pytest hypothesis ruff transformers psutil
	touch $@

clean:
	rm -rf .venv out data
