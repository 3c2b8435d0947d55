# make setup                 the virtual environment, and nothing else
# make run [PROFILE=smoke]   the whole pipeline, from a parent to an evaluated family
# make test [TESTS=tests/flows]   the tests, or a part of them; groups by marker: TESTS="-m browser"; what .ci/run
#                            tests besides: TESTS="-m thorough"
# make soak [TRIALS=50] [FUZZ=10000]   read that many broken files and arguments; then kill runs at random moments,
#                            many times, and compare what they end at (an hour)
# make bench [SECTIONS="steps scan"]   every goal of speed and size against its alternative (half an hour for all)
# make interop [ENGINES="MLX transformers-4.57.6"]   whether other programs read exports and generate the same (half an hour)
# make evidence [PROFILE=smoke]   train a finished run's family in several ways and seeds, and compare (seven hours)
# make dashboard             Prefect server, worker and deployment in the foreground; then
#                            .venv/bin/prefect deployment run elastic/full --watch
# make lint                  ruff
PROFILE ?= default
TRIALS ?= 50
FUZZ ?= 10000
TESTS ?= -m "not thorough"
TEST_WORKERS ?= 3
PYTHON ?= python3
VENV := .venv
SETUP := $(VENV)/.ready
PAGE := .dvc/plots/page.html

.PHONY: setup run test soak bench interop evidence dashboard lint
setup: $(SETUP) $(PAGE)

run: $(SETUP) $(PAGE)
	@$(VENV)/bin/python -m flows.cli run $(PROFILE)

# Where Python shall not keep compiled code, every worker and every stage of a test would compile all of it.
test: $(SETUP) $(PAGE)
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest \
		-n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

soak: $(SETUP)
	FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/fuzz
	$(VENV)/bin/python -m tests.soak --trials $(TRIALS)

bench: $(SETUP)
	env $$($(VENV)/bin/python -m tasks.runtime.environment) $(VENV)/bin/python -m benchmarks.bench $(SECTIONS)

interop: $(SETUP)
	$(VENV)/bin/python -m benchmarks.interop $(if $(ENGINES),--engines $(ENGINES))

evidence: $(SETUP)
	$(VENV)/bin/python -m benchmarks.evidence --profile $(PROFILE)

dashboard: $(SETUP) $(PAGE)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python -m flows.dashboard

lint: $(SETUP)
	$(VENV)/bin/ruff check && $(VENV)/bin/ruff format --check

# torch first and by its exact version: a range would let another package choose a build.
$(SETUP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# DVC's plots load Vega from the internet, unless they are told of a page that has it inside: too large for git.
$(PAGE): $(SETUP)
	$(VENV)/bin/python -m tasks.reporting.vega $@
	$(VENV)/bin/dvc config --local plots.html_template plots/page.html
