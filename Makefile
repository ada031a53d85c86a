PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest

.PHONY: setup demo docs test test-all test-oldest test-matrix faults lint format clean gpu-report \
	bench bench-all bench-claims bench-grids bench-histories bench-phases bench-qwen bench-sound bench-video support resources

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	benchmarks/demo.sh

# The site, into site/: open site/index.html. A block of code that does not run, a name or a link that is not there fail it.
docs: setup
	$(BIN)/python -m pytest tests/test_docs.py tests/test_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All but the tests marked `broad`, which say of every pipeline of the zoo what others say of some.
# Two processes share the files of tests.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ""

# Damaged files, kills, calls without end and threads, all that is tried of them; writes docs/reliability.md.
faults: setup
	$(BIN)/python tests/faults/campaign.py

# With the oldest versions that pyproject.toml declares, in an environment of their own.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check -c constraints-oldest.txt -e '.[bench,models]' \
		hypothesis pytest scipy
	touch $@

# Every environment that can be had here, the tests in each, docs/versions.md of it; QUICK=--quick for some of the tests.
test-matrix:
	$(PYTHON) tests/matrix.py $(QUICK)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What was measured, recorded and trained into out/ stays.
clean:
	rm -rf .venv $(OLDEST) .venv-matrix dist site .hypothesis .pytest_cache .ruff_cache
	find benchmarks models src tests -name __pycache__ -prune -exec rm -rf {} +

# What each makes stands at its head; models/recipes/ trains the predictors that they measure.
bench: setup; benchmarks/flux.sh
bench-all: setup; $(BIN)/python benchmarks/all.py && $(BIN)/python benchmarks/tables.py
bench-claims: setup; benchmarks/claims.sh
bench-grids: setup; benchmarks/grids.sh
bench-histories: setup; benchmarks/histories.sh
bench-phases: setup; models/recipes/flux-runs.sh && $(BIN)/python benchmarks/phases.py
bench-qwen: setup; benchmarks/qwen.sh
bench-video: setup; benchmarks/video.sh
bench-sound: setup; $(BIN)/python benchmarks/sound.py
support: setup; $(BIN)/python benchmarks/support.py
resources: setup; $(BIN)/python benchmarks/resources.py

# The real FLUX.1-dev, Qwen-Image and HunyuanVideo with random weights on one GPU, in less than nine minutes; small ones
# on the CPU with TINY=--tiny.
gpu-report: setup; $(BIN)/python benchmarks/gpu.py $(TINY)
