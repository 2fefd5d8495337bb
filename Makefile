# make demo   sets up .venv, then the whole pipeline on a made-up task: a table and two pictures
# make test   sets up .venv with the libraries to compare with, then linter and tests

PYTHON ?= python3
RATES ?= 2
SEED ?= 1
OUT ?= demo

.PHONY: demo test clean

demo: .venv/product
	.venv/bin/python -m experiments.demo --out $(OUT) --rates $(RATES) --seed $(SEED)

test: .venv/tests
	.venv/bin/ruff format --check . && .venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n 2 --dist worksteal tests

.venv/product: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say make PYTHON=python3.11"; exit 1; }
	@[ "$$(.venv/bin/python -V 2>&1)" = "$$($(PYTHON) -V)" ] || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/tests: requirements-dev.txt .venv/product
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo
