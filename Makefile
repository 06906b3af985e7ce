# Every target works from a bare Python 3.11 or later. Choose one with PYTHON=...
PYTHON ?= python3
VENV := .venv
# Compiled modules halve the start of every program; some machines turn them off.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/installed

.PHONY: demo test check bench accelerator docs colabs format lock clean

demo: $(INSTALLED)
	$(VENV)/bin/python -m experiments.depth_study --config=demo --workdir=runs/demo

# mypy has one core, for half a minute: it runs beside the tests.
test: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy > $(VENV)/types & types=$$!; \
	  $(VENV)/bin/pytest -n 2 --dist worksteal -rs; tests=$$?; \
	  wait $$types; types=$$?; cat $(VENV)/types; exit $$((tests | types))

# About two minutes: what most changes break.
check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -n 2 --dist worksteal tests/layers tests/models \
	  tests/peers/test_flax.py tests/test_methods.py tests/test_public_api.py

# Less than 20 minutes on two cores; each program's --rounds make it longer and surer.
# Nothing else should run on the machine meanwhile.
BENCHMARKS := throughput depth skipinit_cost train_loop start
bench: $(INSTALLED)
	@$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(PIP) install -qq \
	  --no-compile --no-build-isolation --constraint requirements.lock \
	  --editable '.[torch]'
	@mkdir -p results/performance
	for name in $(BENCHMARKS); do \
	  $(VENV)/bin/python -m benchmarks.$$name > results/performance/$$name.tmp && \
	    mv results/performance/$$name.tmp results/performance/$$name.json || exit 1; \
	done
	$(VENV)/bin/python -m experiments.pages

# Twelve minutes on one H100 or H200, and nothing is downloaded meanwhile. Where python3
# has CUDA builds of its own: python3 -m benchmarks.accelerator
accelerator: $(INSTALLED)
	@$(VENV)/bin/python -c 'import jax, torch; gpu = jax.default_backend() == "gpu"; \
	  exit(not gpu or not torch.cuda.is_available())' 2>/dev/null || { \
	  echo "error: JAX or PyTorch sees no GPU here. On a machine that has one:" \
	    "$(PIP) install '.[all,cuda]' pytest pytest-timeout &&" \
	    "$(PIP) install torch --index-url https://download.pytorch.org/whl/cu130" >&2; \
	  exit 1; }
	$(VENV)/bin/python -m benchmarks.accelerator

# The site: docs/_build/html/index.html. A page without a place, a dead link or a docstring
# that cannot be read fails it.
docs: $(INSTALLED)
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet \
	  docs docs/_build/html

# Executes the notebooks: minutes, and every number and figure in them is new.
colabs: $(INSTALLED)
	$(VENV)/bin/python -m colabs.execute

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Pins what setup.py asks for, for every platform and Python version at once. Keeps
# the versions that the file already has; `make lock UPGRADE=--upgrade` takes new ones.
lock: $(INSTALLED)
	$(VENV)/bin/uv pip compile setup.py --extra tests --universal \
	  --python-version 3.11 --no-annotate --quiet $(UPGRADE) \
	  --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .*_cache

# The lock is complete, hence --no-deps. Python compiles what it imports, hence
# --no-compile: it halves the time. The build takes the pinned setuptools, hence --no-build-isolation.
$(INSTALLED): requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11;" \
	    "choose another with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module;" \
	    "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (about a minute)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -qq --no-deps --no-compile --requirement requirements.lock
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@
