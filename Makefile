# Everything lives in a project-local .venv; `make demo` and `make test` need only Python 3.10+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tests of a file share what they build: one process runs them all.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test fuzz check replay docs format bench gpu-check clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --quiet --upgrade pip
	$(BIN)/pip install --quiet --quiet --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## builds the bundled checkpoint for the CPU and generates from it
	$(BIN)/llmc build model_zoo/llama/tales --output tales.llmc --force
	$(BIN)/llmc run tales.llmc "Once upon a time there was a" --max-tokens 120 --temperature 0.5 --top-k 20 --seed 1

test: $(STAMP)  ## the tests, without those marked slow (`make check` runs them too)
	$(PYTEST) -m "not slow"

fuzz: $(STAMP)  ## the property tests with new seeds, for FUZZ_SECONDS seconds
	$(BIN)/python tests/fuzz.py --seconds $(or $(FUZZ_SECONDS),120)

check: $(STAMP)  ## what CI runs: format, lint, types, import layers, all tests
	.ci/checks $(BIN)
	$(PYTEST)

replay: $(STAMP)  ## a sha256 for every file of 30 small builds; COMPARE=FILE shows what an edit changed
	@$(BIN)/python tests/replay.py $(if $(COMPARE),--compare $(COMPARE))

docs: $(STAMP)  ## writes the reference pages that follow from the code
	$(BIN)/python docs/reference/generate.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu-check:  ## on a machine with an NVIDIA GPU: kernels against the reference, speed (docs/gpu/README.md)
	$(PYTHON) benchmarks/gpu_check $(ARGS)

clean:
	rm -rf $(VENV) tales.llmc build *.egg-info .mypy_tree .pytest_cache .ruff_cache .mypy_cache .hypothesis
