# Two commands for a fresh machine with Python 3.11 or newer:
#   make demo   explains the shipped model on the shipped picture
#   make test   runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: demo test lint peers clean

demo: $(VENV)/demo.stamp
	mkdir -p $(OUT)
	$(BIN)/onnx-lrp explain examples/shapes/shapes.onnx examples/shapes/picture.png -o $(OUT)/shapes.png

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(TESTS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peers: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.peers --write docs/performance.md

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[cpu,image]"
	touch $@

# torch first: a version range would bring gigabytes of CUDA. zennit and LXT without their dependencies, for they want torchvision
# and transformers.
$(VENV)/test.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps zennit==0.5.1 lxt==2.1
	touch $@

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache
