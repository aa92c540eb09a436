# make report | test | soak | lab | lint; each installs what is missing first. make streaming adds what storage mds needs, make
# ray what `batch --engine ray` does. make report PLAN=params/tatqa.yaml, make lab ARGS=--allow-root.
PYTHON ?= python3
PLAN ?= params/quick.yaml
BIN := .venv/bin

.PHONY: install streaming ray report test soak lab lint

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# Optional: blocks stored as MosaicML's MDS shards. Its own pins hold back nothing that is used here.
streaming: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-streaming.txt

# Optional: batches on a Ray cluster.
ray: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-ray.txt

# The report is written even when a variant failed: it says which and why.
report: install
	@$(BIN)/python -m nbutils batch $(PLAN); status=$$?; \
	if [ $$status -le 1 ]; then $(BIN)/python -m nbutils report --plan $(PLAN) || status=$$?; fi; exit $$status

# One thread for each of the two processes: more would only wait for one another.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 10 -m "not soak"

# What takes minutes by nature: hundreds of kills, two nodes, nanoGPT's known answer. Before a release.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 10 -m soak

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

lab: install
	$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)
