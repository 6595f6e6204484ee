# Two commands do everything: `make demo` and `make test`. Both make .venv first, if need be.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet -c constraints.txt

.PHONY: demo test results results-real clean

demo: .venv/demo
	$(PY) rho.py
	$(PY) results/plots.py out/demo
	$(PY) results/tokens_page.py out/demo

test: .venv/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

# Every published run again, two single-threaded ones at a time: hours. An interrupted one resumes.
results: .venv/demo
	$(PY) prepare_data.py
	$(PY) results/experiments.py | $(TWO_AT_A_TIME)
	$(PY) results/logs.py --collect

# The runs on real text: PACK names the folder that the text was unpacked into.
results-real: .venv/demo
	$(PY) results/experiments.py real | $(TWO_AT_A_TIME)
	$(PY) results/logs.py --collect

TWO_AT_A_TIME = tr '\n' '\0' | PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 xargs -0 -n1 -P2 sh -c

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch numpy tiktoken datasets matplotlib
	touch $@

.venv/test: .venv/demo
	$(INSTALL) safetensors tokenizers math-verify pytest pytest-xdist hypothesis ruff transformers psutil
	touch $@

clean:
	rm -rf .venv out data
