# The first commands on a fresh machine. PYTHON chooses the interpreter that makes .venv (3.10 or later).
PYTHON ?= python3
VENV = .venv
INSTALLED = $(VENV)/.installed
INSTALLED_FOR_TESTS = $(VENV)/.installed-for-tests

.PHONY: sample demo test campaign bench bench-quality gpu

demo: $(INSTALLED)
	$(VENV)/bin/python train.py --preset demo --run runs/demo
	$(VENV)/bin/python predict.py --run runs/demo --out samples/demo
	@echo "Look at images/samples.png (new slices), images/reconstructions.png, images/refinement.png, images/vqvae_loss.png,"
	@echo "images/codebook_usage.png and images/prior_loss.png; the new slices themselves are in samples/demo."

# Ten seconds, with weights that are part of the repository. One thread: more gain little here, and wait for each other
# on a busy machine.
sample: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python predict.py --run weights/phantom --num 16 --batch-size 16 --out samples/phantom
	@echo "Open images/samples.png: 16 new slices of the phantom. As NIfTI they are in samples/phantom."

# Up to four tests at once, with a thread each: their networks are too small for more.
test: $(INSTALLED_FOR_TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal

# Thousands of kills, full disks, and hostile files and run directories: some 20 minutes. Prints totals.
campaign: $(INSTALLED)
	$(VENV)/bin/python tests/campaign.py

$(INSTALLED): requirements.txt
	scripts/install.sh $(VENV) $(PYTHON) requirements.txt
	touch $@

$(INSTALLED_FOR_TESTS): $(INSTALLED) requirements-test.txt requirements-containers.txt
	scripts/install.sh $(VENV) $(PYTHON) requirements-test.txt
	touch $@

# Speeds, in 8 to 14 minutes on two cores, as a table in runs/bench.md; quality at equal updates, in half an hour.
DATA ?= phantom

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/table.py

# On a machine with a GPU: CPU and GPU side by side, then the benchmarks there: some 6 minutes.
# Where there is none, make gpu CHECK="--device cpu --tiny" shows that the check runs through.
gpu: $(INSTALLED)
	$(VENV)/bin/python benchmarks/gpu.py $(CHECK)

bench-quality: $(INSTALLED)
	$(VENV)/bin/python benchmarks/quality.py --data $(DATA)
