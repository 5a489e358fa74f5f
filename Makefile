# The commands of this repository; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow contract test-gpu bench-gpu check format lint types docs peft-page bench bench-confirm bench-page bench-plan bench-smoke study models-page lab-page browser settings-page quantized-page clean

STAMP := .venv/.complete
BIN := .venv/bin
# Slow tests that look at when processes begin and end; the rest run side by side.
SERIAL := tests/bench/test_pool.py tests/bench/test_cluster.py tests/bench/test_run.py
# One thread and no network, so that results repeat and nothing waits for a hub; compiled modules are kept, since
# tests start many processes.
TESTING := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## make .venv with every package pinned (PYTHON=... picks the interpreter)

$(STAMP): pyproject.toml constraints.txt tools/env.sh
	@tools/env.sh
	@touch $@

demo: env ## fine-tune real models with methods of every branch and open a report
	$(BIN)/peftree demo

test: env ## the quick test suite
	$(TESTING) $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: env ## the tests marked slow
	$(TESTING) $(BIN)/python -m pytest -q -m slow -n 2 --dist worksteal $(SERIAL:%=--ignore %)
	$(TESTING) $(BIN)/python -m pytest -q -m slow $(SERIAL)

contract: env ## every check of the contract over the methods that changed since they passed it, and their record
	PYTHONPATH=tests PEFTREE_FAST=all $(TESTING) $(BIN)/python -m contract.passed

test-gpu: env ## the tests on a GPU (PEFTREE_GPU=1 picks another than the first; skipped where there is none)
	PEFTREE_GPU=$${PEFTREE_GPU:-0} $(TESTING) $(BIN)/python -m pytest -q tests/gpu -k "not cpu"

check: lint types docs $(if $(TESTED),,test) ## format, lint, types, docs, tests and budgets (TESTED=1: tests just ran)

format: env ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: env
	$(TESTING) $(BIN)/mypy

docs: env ## build the documentation into site/, with no network
	$(TESTING) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

quantized-page: env ## adapt packed bases by every method and write the table
	$(TESTING) $(BIN)/python -W ignore tools/quantized_page.py

peft-page: env ## run the matrix of Hugging Face PEFT's files and write its page
	$(TESTING) $(BIN)/python -W ignore tools/peft_page.py

bench: env ## measure the benchmark's sections that the code left behind (SECTION=name: that one; ALL=1: all)
	$(BIN)/python benchmarks/bench.py $(SECTION) $(if $(ALL),--all) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SMALL),--small)
	@$(MAKE) --no-print-directory bench-page

bench-confirm: env ## measure a few rows of the benchmark again, after a change that should not change them
	$(BIN)/python benchmarks/bench.py --confirm
	@$(MAKE) --no-print-directory bench-page

bench-page: env ## docs/bench.md, its figures and what other pages quote, from docs/bench.json
	$(BIN)/python -m tools.bench_page
	$(BIN)/python -m tools.readme

bench-gpu: env ## time and memory of a training step on a GPU, beside Hugging Face PEFT (random weights, bf16)
	$(BIN)/python benchmarks/gpu.py --json results/bench-gpu.json

bench-plan: env ## the planner beside the allocator, real processes and its own time
	$(BIN)/python benchmarks/plan.py

bench-smoke: env ## the smallest suite of the benchmark on real models and data, with its report
	$(BIN)/peftree bench run smoke --out results/smoke
	$(BIN)/peftree report results/smoke --html results/smoke/report.html

study: env ## the study's page, the adviser's evidence and the README's table, from the packed records
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.study
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.evidence.make
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.readme

models-page: env ## docs/models.md from docs/models.json (`python -m tools.models_page measure` measures)
	$(BIN)/python -m tools.models_page

lab-page: env ## docs/lab/index.md from its records (`python -m tools.lab run` makes them)
	$(BIN)/python -m tools.lab

settings-page: env ## docs/settings.md from the configuration of a run
	$(BIN)/python tools/settings.py

browser: ## install Debian's Chromium for the tests of the report, where that is possible
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing Chromium" && \
	  apt-get update -qq >/dev/null && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	echo "Chromium could not be installed; the tests that need it are skipped."

clean: ## remove what the commands made, .venv too
	rm -rf .venv site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
