# make quickstart: from nothing to a cross-validated result.   make test: the tests.   make check: before a commit.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LOCK := requirements.lock
AUDIT := .venv/.audit
# What starts no Ray shares the cores. Two runs on Ray go side by side: each waits for its processes half of the time.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile
RAYS := -n 2 --dist loadfile

.PHONY: install quickstart example test test-slow test-faults test-cluster test-all test-versions check docs format lock audit licenses

install: $(INSTALLED)

# torch is pinned exactly in the lock, so that pip takes the build that fits this machine.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "raycv is tested with Python 3.11 alone, and this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "Installing into .venv: 2.3 GB or more, a minute or several"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: install
	$(BIN)/python -m raycv.run experiment=quickstart cv.folds=5

# The example of the docs: a quickstart's page, and a picture of it. It needs chromium.
example: install
	rm -rf build/example
	$(BIN)/python -m raycv.run experiment=quickstart run.name=quickstart run.dir=build/example tracking.uri=sqlite:///build/example.db
	$(BIN)/python -m scripts.example_page build/example/quickstart

test: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not ray"
	$(BIN)/python -m pytest $(RAYS) -m "not slow and ray"

test-slow: install
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and core and not ray"
	$(BIN)/python -m pytest $(RAYS) -m "slow and core and ray"

# The fault matrix of the docs: processes killed, disks filled, servers stopped.
test-faults: install
	$(BIN)/python -m pytest -m faults

# The cluster launcher on machines made of network namespaces, each with an ssh server. It needs root, and openssh-server.
test-cluster: install
	$(BIN)/python -m pytest tests/test_machines.py tests/test_slurm.py

# Every test there is, and the docs: well over an hour on two cores.
test-all: test docs
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not ray"
	$(BIN)/python -m pytest $(RAYS) -m "slow and ray"

# Fast tests and quickstart on the lowest and on the newest versions that pyproject.toml permits. It downloads 10 GB:
# torch comes with the libraries of a GPU.
UV := .venv/.uv/bin/uv
VERSIONS := build/versions
test-versions: lowest-direct.versions highest.versions

%.versions: install
	@test -x $(UV) || { $(PYTHON) -m venv .venv/.uv && .venv/.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9; }
	$(UV) venv --quiet --clear --python $(BIN)/python $(VERSIONS)/$*
	$(UV) pip compile --quiet --extra dev --extra docs --resolution $* --python $(BIN)/python --output-file $(VERSIONS)/$*.txt pyproject.toml
	$(UV) pip install --quiet --python $(VERSIONS)/$* --requirement $(VERSIONS)/$*.txt
	$(UV) pip install --quiet --python $(VERSIONS)/$* --no-deps --editable .
	$(VERSIONS)/$*/bin/python -m pytest $(PARALLEL) --ignore tests/test_supply.py -m "not slow and not ray"
	cd $(VERSIONS)/$* && RAY_ADDRESS=local bin/python -m raycv.run experiment=quickstart cv.folds=5

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m scripts.doc_commands
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not ray and not long"

# The pages in docs/, into build/docs: a broken link is an error, and nothing is fetched.
docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -n -b html docs build/docs
	$(BIN)/python -m scripts.links build/docs

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The exact versions of this environment, for everyone; torch without the local version of its build.
lock:
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//; s/+cu[0-9]*$$//' > requirements.lock

# Known vulnerabilities of the locked versions. pip-audit gets an environment of its own: it is no part of raycv's.
# It asks pypi.org about each version, which not every mirror passes on; --strict: what it cannot ask is no pass.
ADVISORIES := https://pypi.org/pypi/pip/24.0/json
audit:
	@$(PYTHON) -c 'import sys, urllib.request as r; sys.exit(b"vulnerabilities" not in r.urlopen("$(ADVISORIES)", timeout=20).read())' 2> /dev/null || { echo "audit: the advisories of pypi.org cannot be read from here ($(ADVISORIES)), so NOTHING WAS CHECKED. Run it where there is a network."; exit 1; }
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(LOCK)

# The license of every package that is installed from the lock, as the packages state it.
licenses: install
	@$(BIN)/python scripts/licenses.py $(LOCK)
