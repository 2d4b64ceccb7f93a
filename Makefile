# `make test` and `make train` set up what they need on a machine with Python >= 3.10 and pip. An environment is made
# anew when its constraints file changes, and the package is installed again when pyproject.toml changes.

NEWEST := .venv
OLDEST := .venv-oldest
PYTHON_GPU ?= python3
JOBS ?= 2
ARGS ?=

USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3; do "$$p" -c '$(USABLE)' 2>/dev/null && echo "$$p" && break; done)
endif

PYTEST := -m pytest -n $(JOBS) --dist worksteal --durations=15

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help check test lint types test-newest test-oldest emulate train cells audit gpu rehearse bench format clean

# Tests say themselves whether they want the interpreter.
unexport TRITON_INTERPRET

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=... chooses the interpreter (default: python3.11, else python3); ARGS='...' is passed on."

# What `make check` runs: the library's logic, and a few cases each in the interpreter and in the emulator.
QUICK := tests/repository/test_floors.py tests/repository/test_readme.py tests/repository/test_command_line.py \
  $(patsubst %,tests/kernels/test_%.py,plan tiling hardware cost measurements metadata forecast counts) \
  $(patsubst %,tests/layers/test_%.py,functional modules bad_input bad_options bad_tensors step streaming replacement \
    parameters)
QUICK_INTERPRETED := tests/layers/test_parameters.py tests/layers/test_streaming.py \
  $(patsubst %,tests/kernels/test_scan.py::test_%,equal_inputs_give_equal_bits bound_rejects_a_lost_term) \
  tests/kernels/test_scan.py::test_one_slice_keeps_the_bound_with_any_choice
QUICK_EMULATED := tests/kernels/test_emulated.py::test_as_planned tests/kernels/test_emulated.py::test_a_stack_in_one_launch

check: lint types ## in under 3 minutes on two idle cores: lint, types and the quick tests, for the daily loop
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(NEWEST)/bin/python $(PYTEST) -m interpreter $(QUICK_INTERPRETED) $(ARGS)
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST) -m "not interpreter and not gpu" $(QUICK) $(QUICK_EMULATED) $(ARGS)

test: lint types test-newest test-oldest ## all that needs no GPU, a sample of it on the oldest Triton; what CI runs

test-newest: $(NEWEST)/.dev ## every test that needs no GPU, newest Triton
	@echo "== $(NEWEST): $$(tr '\n' ' ' <$(NEWEST)/versions.txt)"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(NEWEST)/bin/python $(PYTEST) -m "interpreter and not gpu" tests $(ARGS)
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST) -m "not interpreter and not gpu and not emulator_long" tests $(ARGS)
	OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 $(NEWEST)/bin/python $(PYTEST) -m "torch_path and not interpreter" --sample 2 tests $(ARGS)

# Of each test one case in three: the newest Triton runs them all.
SAMPLE := --sample 3
test-oldest: $(OLDEST)/.dev ## a sample of the kernels' tests, oldest Triton; not those of torch around them
	@echo "== $(OLDEST): $$(tr '\n' ' ' <$(OLDEST)/versions.txt)"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(OLDEST)/bin/python $(PYTEST) -m "interpreter and not gpu" -k "not compile and not export" \
	  $(SAMPLE) tests/kernels $(patsubst %,tests/layers/test_%.py,ops unread_values) $(ARGS)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "(audit or emulator) and not gpu" $(SAMPLE) tests $(ARGS)

emulate: $(NEWEST)/.dev $(OLDEST)/.dev ## more of the compiled kernels in the emulator, on both Triton versions (about half an hour)
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST) -m emulator_long tests $(ARGS)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m emulator_long tests $(ARGS)

lint: $(NEWEST)/.dev ## ruff: rules and format
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .

format: $(NEWEST)/.dev ## let ruff rewrite the files
	$(NEWEST)/bin/ruff check --fix .
	$(NEWEST)/bin/ruff format .

types: $(NEWEST)/.dev ## mypy over persistrnn, persistrnn.kernels and bench
	$(NEWEST)/bin/mypy -p persistrnn -p bench

train: $(NEWEST)/.train ## the main job: train the language model
	$(NEWEST)/bin/python -m bench.train.language_model $(ARGS)

# Resumable: what is trained is kept in runs/cells. The results are committed in bench/results/cells.
cells: $(NEWEST)/.dev ## the language model with every cell at equal parameters, on a CPU: a table, a drawing, a page
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m bench.cells $(ARGS)

# Resumable: finished kernels are kept in runs/. The tables are committed, and tests compare them with today's code.
# bf16 in every shape of a workload; bench/audit.csv names its own dtypes and architectures.
AUDIT := -m persistrnn audit --workloads bench/workloads/*.csv bench/audit.csv --dtypes bf16 --arch sm_80 sm_90 --failures
audit: $(NEWEST)/.dev $(OLDEST)/.dev ## read the compiled kernels of every workload, on both Tritons (35 minutes of one core)
	$(NEWEST)/bin/python $(AUDIT) --jobs $(JOBS) --resume runs/audit.jsonl --output bench/results/audit-newest.csv $(ARGS)
	$(OLDEST)/bin/python $(AUDIT) --jobs $(JOBS) --resume runs/audit.jsonl --output bench/results/audit-oldest.csv $(ARGS)

# The GPU machine may have no package index: its own Python brings torch, Triton and pytest.
gpu: ## correctness, stress, micro, race and tune on a GPU, with its own Python (PYTHON_GPU); ARGS=first before all else
	PYTHONUNBUFFERED=1 $(PYTHON_GPU) -m bench.gpu $(ARGS)

rehearse: $(NEWEST)/.dev ## the same without a GPU: every path but the launch, predictions for an H200, no speeds
	PYTHONUNBUFFERED=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m bench.gpu --rehearse h200 $(ARGS)

bench: $(NEWEST)/.dev ## what a CPU can measure: our Python around torch's path, plan time, compile time
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest bench/race --benchmark-only $(ARGS)

clean: ## remove environments, caches and builds (not runs/)
	rm -rf $(NEWEST) $(OLDEST) build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache

$(NEWEST)/.torch: constraints.txt
$(OLDEST)/.torch: constraints-oldest.txt
$(NEWEST)/.torch $(OLDEST)/.torch:
	@'$(PYTHON)' -c '$(USABLE)' 2>/dev/null || { echo >&2 \
	  "PYTHON='$(PYTHON)' does not serve: Python >= 3.10 with venv and pip is needed (by default python3.11, else python3)." \
	  "Install one (on Debian or Ubuntu: python3 and python3-venv) or name one: make PYTHON=/path/to/python3"; exit 1; }
	'$(PYTHON)' -m venv --clear $(@D)
	@echo "installing torch and Triton into $(@D) as $< says"
	@if ! $(@D)/bin/python -m pip install -c $< torch triton numpy >$(@D)/install.log 2>&1; then \
	  grep -q -e ResolutionImpossible -e 'No matching distribution found for triton' $(@D)/install.log \
	    || { cat $(@D)/install.log >&2; exit 1; }; \
	  echo "$<: the resolver refuses this pair here; taking torch's own Triton"; \
	  grep -v '^triton' $< >$(@D)/constraints.txt; \
	  $(@D)/bin/python -m pip install -q -c $(@D)/constraints.txt torch triton numpy; \
	fi
	@$(@D)/bin/python -m pip list --format=freeze | grep -E '^(torch|triton|numpy)==' >$(@D)/versions.txt
	@echo "$(@D) has $$(tr '\n' ' ' <$(@D)/versions.txt)"
	@touch $@

%/.dev: %/.torch pyproject.toml
	$*/bin/python -m pip install -q -c $*/versions.txt -e '.[dev]'
	@touch $@

%/.train: %/.torch pyproject.toml
	$*/bin/python -m pip install -q -c $*/versions.txt -e '.[train]'
	@touch $@
