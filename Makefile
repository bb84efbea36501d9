# Everything runs in .venv, which is made from requirements.txt when that or pyproject.toml has changed.
PYTHON ?= python3
PROFILE ?= laptop
MODEL ?=
TORCH ?= 2.13.0
TRANSFORMERS ?= 5.23.*
TRITON ?= 3.9.0
RAY ?= 2.60.0

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help run smoke test bench lab lint lock clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 14

run: $(STAMP)  ## measure everything and rewrite notebooks, figures and tables (PROFILE=laptop, MODEL=name or path)
	$(BIN)/python -m kvlib.run --profile $(PROFILE) --rows all $(if $(MODEL),--model "$(MODEL)")

smoke: $(STAMP)  ## run every notebook at its smallest, into a folder of its own
	$(BIN)/python -m kvlib.run --profile smoke --rows all --fresh

test: $(STAMP)  ## run the tests (some use Triton, which torch's CPU build does not bring, and Ray, which is an extra)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet "triton==$(TRITON)" \
		|| echo "make: no Triton for this machine, its tests are skipped" >&2
	@$(BIN)/python -c 'import ray' 2>/dev/null || $(BIN)/pip install --quiet "ray==$(RAY)" --constraint requirements.txt \
		|| echo "make: no Ray for this machine, its tests are skipped" >&2
	$(BIN)/python -m pytest

bench: $(STAMP)  ## attention kernels against torch's, with ratios and percent of the bandwidth (about 4 minutes)
	$(BIN)/python -m kvlib.measure.bench_attention --profile $(PROFILE)

lab: $(STAMP)  ## open the notebooks in JupyterLab on this machine
	$(BIN)/jupyter lab --ip 127.0.0.1 --notebook-dir notebooks

lint: $(STAMP)  ## check the style of the code
	$(BIN)/ruff check kvlib tests

lock: python-version  ## write requirements.txt anew from pyproject.toml (TORCH=2.13.0, TRANSFORMERS=5.23.*)
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet "torch==$(TORCH)" "transformers==$(TRANSFORMERS)" --editable ".[dev]"
	head -1 requirements.txt > .venv-lock/requirements.txt
	.venv-lock/bin/pip freeze --all --exclude-editable --exclude pip --exclude wheel \
		| sed -E '/^(nvidia|cuda|triton)/d; s/^(torch==[^+]*)\+.*/\1/' >> .venv-lock/requirements.txt
	mv .venv-lock/requirements.txt requirements.txt
	rm -rf .venv-lock

clean:  ## remove .venv, caches and the notebooks of other profiles; results and figures stay
	rm -rf .venv .venv-lock .pytest_cache .ruff_cache .hypothesis *.egg-info notebooks/executed notebooks/failed
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: python-version
python-version:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null || echo missing); \
		echo "make: needs Python 3.11 or newer, $(PYTHON) is $$found; choose one with PYTHON=/path/to/python3" >&2; exit 1; }

$(STAMP): requirements.txt pyproject.toml | python-version
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
