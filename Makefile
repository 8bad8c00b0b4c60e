# Two commands are all a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-peers test-arm test-sanitize check lint clean

demo: .venv/.ready  ## quantize, verify and evaluate the bundled model at 8, 4, 3 and 2 bits
	$(BIN)/python -m fewbits demo

test: .venv/.ready  ## the default tests (minutes)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-peers: .venv/.peers  ## the tests that run llama.cpp; builds it first (10 to 25 minutes)
	$(BIN)/python -m pytest -n auto tests/models tests/pipeline

# Programs of the kernels alone; 77 says that a compiler or an emulator is missing here.
test-arm: .venv/.ready  ## the kernels for ARM under qemu (minutes); apt-get install g++-aarch64-linux-gnu qemu-user-static
	$(BIN)/python tests/runtime/cross/run.py arm || test $$? -eq 77

test-sanitize: .venv/.ready  ## the kernels with sanitizers of addresses, undefined behaviour and threads (minutes)
	$(BIN)/python tests/runtime/cross/run.py sanitize || test $$? -eq 77
	$(BIN)/python tests/runtime/cross/run.py threads || test $$? -eq 77

check: lint test  ## everything that must hold before a commit

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch comes first and alone: with it in place nothing else pulls in a CUDA build of several gigabytes.
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/.peers: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama-cpp]'
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
