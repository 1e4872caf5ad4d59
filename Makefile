# Everything lives in a project-local .venv; `make demo` and `make test` need only Python 3.10+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a demo needs, and what the tests need beside it. Neither installs a CUDA build of torch.
BUILD := $(VENV)/.installed-build
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The tests of a file share what they build: one process runs them all. A process that dies ends the run, with the
# name of its test: xdist may wait forever if a test ends two processes.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0

.PHONY: demo test fuzz sanitize check replay docs format bench gpu-check clean

$(BUILD): pyproject.toml
	@echo "setting up $(VENV) with what a CPU demo needs: about 1.5 GB, a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install --no-deps --retries 1 --index-url $(TORCH_INDEX) '$(TORCH)' || \
		echo "no CPU build of torch from $(TORCH_INDEX): pip takes the one of PyPI, which may be larger"
	$(BIN)/pip install --editable '.[build]'
	touch $@

$(STAMP): $(BUILD)
	@echo "adding what the tests need: pytest, linters, triton, tensorrt-rtx"
	$(BIN)/pip install --editable '.[dev]'
	touch $@

demo: $(BUILD)  ## builds the bundled checkpoint for the CPU and generates from it
	$(BIN)/llmc build model_zoo/llama/tales --output tales.llmc --force
	$(BIN)/llmc run tales.llmc "Once upon a time there was a" --max-tokens 120 --temperature 0.5 --top-k 20 --seed 1

test: $(STAMP)  ## the tests, without those marked slow (`make check` runs them too)
	$(PYTEST) -m "not slow"

fuzz: $(STAMP)  ## the property tests with new seeds, for FUZZ_SECONDS seconds
	$(BIN)/python tests/fuzz.py --seconds $(or $(FUZZ_SECONDS),120)

sanitize: $(STAMP)  ## the native engine under sanitizers: its tests, 1,000 programs and 1,000 steps
	@gcc --version > /dev/null || { echo "error: it needs the sanitizers of gcc: apt-get install gcc"; exit 1; }
	$(BIN)/python plugins/cpu/build.py --sanitize build/sanitized
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest -q -m "not slow" --native-libraries build/sanitized --hypothesis-profile=fuzz \
		tests/runtime/test_native_engine.py tests/runtime/test_native_fuzz.py tests/runtime/test_native_collectives.py

check: $(STAMP)  ## what CI runs: format, lint, types, import layers, all tests
	.ci/checks $(BIN)
	$(PYTEST)

replay: $(STAMP)  ## a sha256 for every file of 45 small builds; COMPARE=FILE shows what an edit changed
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
