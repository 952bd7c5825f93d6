# make book    build the book in _build/html          make test    every test
# make pdf     print what `make book` built, as one PDF: _build/book.pdf
# make check   format, lint, types and quick tests    make clean   remove what was built
# make strip   remove the outputs from the notebooks  make bench   measure what selection costs
# make lowest  quick tests with the oldest packages   make publish-check   what a release is checked for
# make fidelity   compare the published system with a literal reading of the authors' code
# make gpu     check and time what is said of GPUs, in minutes; ARGS="--data-root data" trains too
# make torture  kill runs, flip bits, make up input, look for leaks: minutes, with a table of counts
# make notebook NAME=swd-on-cifar10 ARGS="-p profile laptop -p seed 1"
# With TORCH=cpu, PyTorch comes without CUDA, from its own index: make book TORCH=cpu
PYTHON ?= python3
PROFILE ?= smoke
TORCH_INDEX ?= https://download.pytorch.org/whl/$(TORCH)
VENV := .venv
BIN := $(VENV)/bin
torch = $(if $(TORCH),$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) torch torchvision)

.DEFAULT_GOAL := help
.PHONY: help book pdf test check bench fidelity gpu torture notebook strip lowest publish-check clean distclean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

book: $(VENV)/.book
	$(BIN)/python book/build.py book --profile $(PROFILE)

pdf: $(VENV)/.test
	$(BIN)/python book/pdf.py

# Two processes, each with whole files of tests, since the tests of a file share what takes long to make.
# One that crashes ends the run: put in the place of another, it would wait for ever (xdist issue 1323).
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

notebook: $(VENV)/.book
	$(if $(NAME),,$(error Say which notebook to run, for example: make notebook NAME=swd-on-cifar10))
	$(BIN)/python book/build.py notebook $(NAME) $(ARGS)

# On a machine that others use too: make bench OMP_NUM_THREADS=1
bench: $(VENV)/.book
	$(if $(OMP_NUM_THREADS),OMP_NUM_THREADS=$(OMP_NUM_THREADS)) $(BIN)/python book/bench.py $(ARGS)

fidelity: $(VENV)/.test
	$(BIN)/python -m tests.fidelity

gpu: $(VENV)/.test
	$(BIN)/python -m tests.gpu $(ARGS)

torture: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(ARGS)

strip: $(VENV)/.book
	$(BIN)/python book/build.py strip

# The lowest versions that pyproject.toml allows of what the library needs; not of the book's tools.
# Packages of different ages warn of each other.
lowest: $(VENV)/bin/pip
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python _build/lowest
	$(BIN)/uv pip install --quiet --python _build/lowest --resolution lowest-direct \
	    -e '.[lab,unit]'
	_build/lowest/bin/python -m pytest -m "not slow" -W ignore::DeprecationWarning -W ignore::FutureWarning \
	    tests --ignore=tests/book --ignore=tests/lab --ignore=tests/test_hooks.py \
	    --ignore=tests/test_project.py --ignore=tests/test_prune.py --ignore=tests/test_publishing.py

# All that publish.yml does before it uploads, offline; with TAG=v0.1.0, the version is that of the tag.
publish-check: $(VENV)/.test
	$(BIN)/actionlint .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github
	rm -rf dist
	$(BIN)/python -m build --no-isolation > /dev/null
	$(BIN)/twine check --strict dist/*
	$(if $(TAG),test -f dist/swdlib-$(TAG:v%=%)-py3-none-any.whl)

clean:
	rm -rf _build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find book swdlib tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# An empty file stands for "these extras are installed"; it is older than a changed pyproject.toml.
$(VENV)/.book: pyproject.toml | $(VENV)/bin/pip
	$(torch)
	$(BIN)/python -m pip install --quiet -e '.[book]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/pip
	$(torch)
	$(BIN)/python -m pip install --quiet -e '.[book,test]'
	@[ -x /usr/bin/chromium ] || $(BIN)/playwright install chromium > /dev/null 2>&1 \
	    || echo "No chromium, and none could be fetched: the tests in a browser will be skipped"
	@touch $(VENV)/.book $@

# Debian's Python has no ensurepip without python3-venv; its own pip can fill the environment instead.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' \
	    || { echo "swdlib needs Python 3.10 to 3.14: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --quiet --python $(BIN)/python install pip; \
	fi || { echo "No environment could be made; on Debian: apt-get install python3-venv" >&2; exit 1; }
