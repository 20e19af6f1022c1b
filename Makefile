# Two commands on a fresh machine: make quickstart, make test.
PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
# The first Python 3.12 or newer that really runs (a shim may exist and fail).
FIND_LATEST = for p in python3.12 python3.13 python3.14 $$HOME/.pyenv/versions/3.1[2-9]*/bin/python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then echo $$p; break; fi; done
constraints = constraints/$$($(1) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
WORKDIR ?= runs/quickstart

.PHONY: help quickstart test test-latest nightly lint clean

help:
	@echo "make quickstart   train, checkpoint and sample a small JTok-M model (2 to 5 minutes on 2 cores)"
	@echo "make test         the test suite, and make lint"
	@echo "make test-latest  what depends on the versions, on Python 3.12 or newer with the newest pins"
	@echo "make nightly      that with every test, and the largest model compiled for TPUs and H100s (long)"
	@echo "make clean        remove the virtual environments (runs/ and data/ stay)"

$(VENV)/run: pyproject.toml constraints/py311.txt constraints/py312.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; pass PYTHON=/path/to/python3.11 or newer."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c $(call constraints,$(PYTHON)) -e .
	@touch $@

$(VENV)/dev: $(VENV)/run
	$(VENV)/bin/python -m pip install --quiet -c $(call constraints,$(PYTHON)) -e '.[dev]'
	@touch $@

# Large pages for malloc: fewer page faults in a step on a CPU. C libraries but glibc ignore it.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: $(VENV)/run
	$(VENV)/bin/python -m jtok_jax.prepare --input=stdlib --output=data/stdlib
	$(VENV)/bin/python train.py --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(VENV)/bin/python -m jtok_jax.generate --workdir=$(WORKDIR) --prompt='def ' --tokens=60

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist=worksteal

test-latest: export SECOND_PYTHON = 1
test-latest:
	@python=$$($(FIND_LATEST)); \
	if [ -z "$$python" ]; then echo "SKIPPED: no Python 3.12 or newer runs on this machine"; exit 0; fi; \
	set -e; $$python -m venv $(LATEST); \
	$(LATEST)/bin/python -m pip install --quiet -c constraints/py312.txt -e '.[dev,aot]'; \
	$(LATEST)/bin/python -m pytest -n 2 --dist=worksteal $(SELECT)

nightly:
	NIGHTLY=1 $(MAKE) test-latest SELECT='tests tests/nightly.py'

clean:
	rm -rf $(VENV) $(LATEST)
