# Everything happens in .venv. `make` alone prints what there is; a second call installs nothing that is there already.

PYTHON ?= python3
SHELL := bash
REQUIREMENTS := $(if $(CPU),requirements-cpu.txt,requirements.txt)

# As root JupyterLab wants to be told that this is meant; without a display it prints its address instead.
LAB_FLAGS := $(if $(filter 0,$(shell id -u)),--allow-root) \
    $(if $(or $(DISPLAY),$(WAYLAND_DISPLAY),$(filter Darwin,$(shell uname))),,--no-browser)

.PHONY: help lab run record train test clean ready
.DEFAULT_GOAL := help

help:
	@echo 'make lab      open the notebooks in JupyterLab, beginning with 00_welcome'
	@echo 'make run      execute every notebook into runs/notebooks, then show the ladder and a sample'
	@echo 'make train    train a small GPT on this machine and let it write; ARGS="--help" shows the choices'
	@echo 'make test     run all tests, the notebooks included'
	@echo 'make record   execute every notebook in place and store its outputs (for authors)'
	@echo 'make clean    remove .venv and caches; runs/ stays'
	@echo
	@echo 'The first call sets up .venv. On Linux without a GPU add CPU=1, which saves gigabytes.'
	@echo 'PYTHON=python3.12 names another Python (3.11 or newer).'

lab: ready
	@.venv/bin/python -m jupyterlab --log-level=WARN $(LAB_FLAGS) \
	    --LabApp.default_url=/lab/tree/notebooks/00_welcome.ipynb

run: ready
	@.venv/bin/python -m slm_lib run-notebooks

record: ready
	@.venv/bin/python -m slm_lib record-notebooks

train: ready
	@.venv/bin/python -m slm_lib train $(ARGS)

# The notebooks are tested on playhouse, and on Shakespeare too where it is at hand.
AT_HAND := .venv/bin/python -c 'import sys; from slm_lib.data import find_shakespeare; sys.exit(not find_shakespeare())'
NBVAL := .venv/bin/python -m pytest -q --nbval notebooks -n 2 --dist loadscope

test: ready .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n 2
	SLM_CORPUS=playhouse $(NBVAL)
	if $(AT_HAND); then SLM_CORPUS=shakespeare $(NBVAL); else echo 'Shakespeare is not at hand: not tested on it'; fi

clean:
	rm -rf .venv build slm_lib.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up -----------------------------------------------------------------------------------------------------------

ready: .venv/installed

.venv/installed: requirements.txt requirements-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo '$(PYTHON) is not Python 3.11 or newer: name one, as in `make lab PYTHON=python3.12`'; exit 1; }
	@test -x .venv/bin/python || echo 'setting up .venv, once (a few minutes; torch is the large part)'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check 'pip>=24.1'  # older ones cannot tell their progress
	@$(call install,-r $(REQUIREMENTS))
	@.venv/bin/python -m slm_lib download --if-online
	@touch $@

.venv/installed-test: .venv/installed
	@$(call install,-e '.[test]')
	@touch $@

# pip in short: large downloads as they come, and how many packages it installs; if it fails, the end of what it said.
define install
set -o pipefail; .venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar raw $(1) 2>&1 \
    | tee .venv/pip.log | .venv/bin/python -c "$$PROGRESS" \
    || { grep -v ^Progress .venv/pip.log | tail -n 25 | cut -c1-200; exit 1; }
endef

define PROGRESS
import re, sys
name, live = "", sys.stdout.isatty()
for line in sys.stdin:
    if found := re.match(r"\s*Downloading ([\w.]+?)-\d\S*whl \(", line):
        name = found[1]
    elif found := re.match(r"Progress (\d+) of (\d+)", line):
        done, all = (int(n) / 1e6 for n in found.groups())
        if all > 10 and (live or done == all):
            print(f"  {name}: {done:.0f} of {all:.0f} MB", end="\n" if done == all else "  \r", flush=True)
    elif line.startswith("Installing collected packages:"):
        print(f"  installing {line.count(',') + 1} packages", flush=True)
endef
export PROGRESS
