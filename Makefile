# `make demo` and `make test` each do everything, on a fresh machine too: they make .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Of the small studies: folders of your models and data (see the header of each file in studies/).
ENCODER ?= sentence-transformers/all-MiniLM-L6-v2
CAUSAL ?= roneneldan/TinyStories-3M
DATA ?= runs/data
RESULTS ?= runs/studies
WORKERS ?= 1
STUDIES := placement gradient_delta adalora_budgets plateau quantised methods compress tasks

.PHONY: demo test lint format studies $(addprefix study-,$(STUDIES))

demo: $(STAMP)
	$(BIN)/adaptive-lora demo --output demo-output/$$(date +%Y%m%d-%H%M%S)

# HAS_AVX512BF16=0 or 1 answers for the processor; ATEN_CPU_CAPABILITY=avx2 limits torch. Both reach .ci/run too.
test: $(STAMP)
	$(if $(HAS_AVX512BF16),HAS_AVX512BF16=$(HAS_AVX512BF16) PYTHONPATH=tests/processor) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Every small study: hours on two cores. Killed and started again it goes on. One of them: make study-placement.
studies: $(addprefix study-,$(STUDIES))

$(addprefix study-,$(STUDIES)): study-%: $(STAMP) $(RESULTS)/alpaca/train.parquet
	$(BIN)/adaptive-lora study studies/$*.yaml --output $(RESULTS)/$* --workers $(WORKERS) --set paths.encoder=$(ENCODER) \
	  --set paths.causal=$(CAUSAL) --set paths.data=$(DATA) --set paths.alpaca=$(RESULTS)/alpaca

$(RESULTS)/alpaca/train.parquet: $(STAMP)
	$(BIN)/python studies/split.py $(DATA)/alpaca/alpaca_5000.parquet --rows 2100 --test 300 --output $(RESULTS)/alpaca

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@
