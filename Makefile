# make demo   sets up .venv, then the whole pipeline on a made-up task: a table and two pictures in OUT
# make test   sets up .venv with the libraries to compare with, then the tests

PYTHON ?= python3
RATES ?= 2
SEED ?= 1
OUT ?= demo

.PHONY: demo test clean

demo: .venv/product
	.venv/bin/python demo.py --out $(OUT) --rates $(RATES) --seed $(SEED)

test: .venv/tests
	.venv/bin/python -m pytest -q tests

.venv/product: requirements.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/tests: requirements-dev.txt .venv/product
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo
