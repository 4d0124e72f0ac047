# Two commands: `make demo` and `make test`. Both make .venv first; a second run installs nothing.
PYTHON ?= python3
# Address of a PyTorch package index (its CPU build, another CUDA); empty takes the default build of your package index.
TORCH_INDEX ?=

BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-all test-gpu lint bench install clean

demo: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

# Two processes halve the time and take 3 GB together; a file's tests stay in one, as they share what they started.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "longscan needs Python 3.11 or newer; this is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python tools/install.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
