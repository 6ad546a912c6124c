# Short names for what scripts/bootstrap.py runs in .venv, which it makes where it is missing.
PYTHON ?= python3
RUN = $(PYTHON) scripts/bootstrap.py

.PHONY: dev lint type contracts test test-all test-gpu demo

dev:
	$(RUN) setup

lint:
	$(RUN) lint

type:
	$(RUN) type

contracts:
	$(RUN) contracts

test:
	$(RUN) test -m "not slow"

test-all:
	$(RUN) test

test-gpu:
	$(RUN) test -m gpu

demo:
	$(RUN) demo
