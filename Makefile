# make demo: every stage on generated faces.  make test: the whole suite.  make soak: long trials of reliability.
# make docs: the pages of docs/ as a site.
# Each installs what it needs into .venv; the last four packages there are for the tests of export.py.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak lint docs
demo: .venv/installed
	$(BIN)/python demo.py

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile

soak: .venv/installed
	$(BIN)/python -m tests.soak

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "Written to site: open site/index.html"

.venv-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

.venv/installed: requirements.txt Makefile
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
		"pytest>=8" pytest-xdist pytest-randomly "ruff==0.17.5" "mypy==2.4.1" onnx onnxruntime onnxscript safetensors
	touch $@
