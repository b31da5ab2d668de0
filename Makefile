# A fresh checkout needs nothing but `make quickstart` or `make test`: each makes .venv first where it is missing.
PYTHON ?=
WORKERS ?= auto
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -rs -n $(WORKERS) --dist loadfile

.PHONY: help quickstart test test-slow check format hooks clean

help:
	@echo "make quickstart   SFT -> reward model -> PPO on the embedded task, on the CPU, in a few minutes"
	@echo "make test         the fast tests: unit, contract, parity, smoke"
	@echo "make test-slow    the slow ones: faults, several processes"
	@echo "make check        formatter, linters, type checker, import layers"
	@echo "make format       let ruff write what make check would complain about"
	@echo "make hooks        run make check before every commit"

quickstart: .venv/.run
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(PY) -m rlhf_jax.train --config configs/quickstart.yaml

test: .venv/.test
	$(PYTEST) -m "not slow" tests

test-slow: .venv/.test
	@$(PYTEST) -m slow tests || { status=$$?; test $$status -eq 5 && echo "make test-slow: no slow tests"; }

check: .venv/.test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright
	.venv/bin/lint-imports
	.venv/bin/shellcheck launch/*.sh

format: .venv/.test
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

hooks: .venv/.test
	$(PY) -m pip install --quiet pre-commit
	$(PY) -m pre_commit install

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info

# What is installed is stamped, so that a second `make` starts at once; a changed requirement installs again.
.venv/.run: requirements.txt
	$(make_venv)
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

.venv/.test: requirements.txt pyproject.toml
	$(make_venv)
	$(PY) -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/.run

# Keeps a working .venv; else makes one with the first Python >= 3.12 (PYTHON=... is tried first).
define make_venv
@$(PY) -m pip --version >/dev/null 2>&1 && exit 0; \
for python in $(PYTHON) python3.13 python3.12 python3 python; do \
  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
    echo "making .venv with $$("$$python" --version) ($$(command -v "$$python"))"; \
    exec "$$python" -m venv --clear .venv; \
  fi; \
done; \
echo "rlhf_jax needs Python 3.12 or newer (with venv), and none was found as $(strip $(PYTHON) python3.13), python3.12," >&2; \
echo "python3 or python. Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install" >&2; \
echo "python@3.12; or: pyenv install 3.12), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
exit 1
endef
