# fastuda: `make demo` and `make test` set up everything they need in .venv
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test build-gpu gpu-kit gpu-check test-gpu bench bench-gpu bench-gpu-steps docs lint format clean

# what a run needs, and then what the tests, the lint and the documentation need as well
$(VENV)/.runtime: setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/units/* csrc/cpu/* csrc/cuda/*)
	@echo "setting up $(VENV), 1 of 3: pip and ninja"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip "setuptools>=64" wheel ninja
	@echo "setting up $(VENV), 2 of 3: torch"
	$(BIN)/python -m pip install "torch>=2.11,<2.14" "numpy<2.4"
	@echo "setting up $(VENV), 3 of 3: fastuda; its C++ kernels compile for a minute or two"
	$(BIN)/python -m pip install --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed: $(VENV)/.runtime
	@echo "installing what the tests, the lint and the documentation need"
	FASTUDA_BUILD=none $(BIN)/python -m pip install --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/python -m fastuda.train --method plca --amp

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow or not slow" -n $(WORKERS) --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(BIN)/clang-format -i

# The GPU targets use the machine's own Python and packages: they need no package index. Each begins with the build
# and ends GPU_SECONDS after it, with what it found by then. Where pytest-xdist is, GPU_WORKERS processes share the card.
GPU_SECONDS ?= 440
GPU_WORKERS ?= 8
GPU_CSV = $(if $(CSV),--csv $(CSV))

build-gpu:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"error: torch {torch.__version__} of $(PYTHON) finds no CUDA device")'
	$(PYTHON) setup.py build_ext --inplace

# What a lent GPU needs: the kit, made before with the versions of its machine, then the check in at most 420 s and 210 s.
PART ?= 1

gpu-kit:
	$(PYTHON) -m bench.gpu_kit

gpu-check:
	@test -n "$(OUT)" || { echo "error: say where to: make gpu-check OUT=DIR [PART=2] [AFTER=DIR]"; exit 2; }
	$(PYTHON) -m bench.gpu_check "$(OUT)" --part $(PART) $(if $(AFTER),--after "$(AFTER)")

test-gpu: build-gpu
	OMP_NUM_THREADS=2 timeout --signal INT --kill-after 30 $(GPU_SECONDS) $(PYTHON) -m pytest -q -m gpu tests/gpu --durations 15 \
		$$($(PYTHON) -c 'import xdist' 2>/dev/null && echo "-n $(GPU_WORKERS) --dist loadgroup")

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet matplotlib faiss-cpu pykeops
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.run --sweep
	$(BIN)/python -m bench.plot

bench-gpu: build-gpu
	$(PYTHON) -m bench.run --device cuda --timeout 100 --budget $(GPU_SECONDS) $(GPU_CSV)

bench-gpu-steps: build-gpu
	$(PYTHON) -m bench.end_to_end --device cuda --backbone resnet101 --crop 730 730 --batch-size 4 --steps 6 \
		--workers 8 --budget $(GPU_SECONDS) $(if $(CSV),$(GPU_CSV),--csv bench/results/end_to_end_gpu.csv)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean --site-dir build/site
	@echo "open build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info fastuda/_C*.so fastuda/_cuda.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
