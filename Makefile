# The commands of the README. Each does its own set-up; needs Python 3.11-3.13, git and make.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN := $(VENV)/bin/python
BUDGET ?= 900
DATA ?=

.PHONY: demo test photos lint setup clean full-size bench-gpu
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11-3.13 found; pass PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up $(VENV) (about two minutes, 6 GB: torch with CUDA)"
	@start=$$(date +%s) && $(PYTHON) -m venv $(VENV) && \
	  $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	  echo $$(( $$(date +%s) - start )) > $(VENV)/set_up_seconds && touch $@

demo: setup  ## digits: tokenizer, generator, samples, evaluation; outputs/demo/
	SET_UP_SECONDS=$$(cat $(VENV)/set_up_seconds) $(RUN) scripts/demo.py out=outputs/demo

test: setup  ## the test suite, one process a core
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

photos: setup  ## CIFAR-10, both kinds; BUDGET seconds a training stage; DATA=<folder with train/ and test/>, or cifar10-jpg.tar.xz in . or data
	$(RUN) scripts/photos.py budget=$(BUDGET) out=outputs/photos $(if $(DATA),folder=$(DATA))

full-size: setup  ## files of published size with random weights: load, sample, round trip; minutes, up to 4 GB
	$(RUN) scripts/full_size.py

bench-gpu: setup  ## speed on one GPU, in calls of under nine minutes; call it again until nothing is left; PEERS=<folder of the originals>
	@$(RUN) -c 'import torchao' 2>/dev/null || \
	  $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quant]' || \
	  echo "note: torchao was not installed: rows of 8-bit weights fail, the others are measured"
	$(RUN) scripts/bench_gpu.py $(if $(PEERS),peers=$(PEERS)) && $(RUN) scripts/benchmarks.py

lint: setup
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) outputs multirun build dist *.egg-info
