# `make demo` and `make test` need nothing before them but Python 3.11; `make help` lists the rest.

VENV := .venv
# For install: DESTDIR stages it, PORT replaces the daemon's port of the port map, INTERPRETER is a
# Python that has gpuorchd[daemon] already, ACTIVATE=no makes no users and tells systemd nothing.
DESTDIR :=
PREFIX := /usr/local
SYSCONFDIR := /etc
PORT :=
INTERPRETER :=
ACTIVATE := yes
PYTHON_IN := $(VENV)/bin/python
# Warnings of the installer about indexes say nothing to whoever runs a demo; errors still show.
INSTALL := $(PYTHON_IN) -m pip install -qq --no-input --disable-pip-version-check \
	--constraint requirements.lock
PINS := setup.cfg pyproject.toml requirements.lock

.DELETE_ON_ERROR:
.PHONY: help demo test lint bench soak install uninstall lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.daemon-installed  ## the roster of agents on one host, live in the terminal
	@$(PYTHON_IN) -m libclient.demo

test: $(VENV)/.dev-installed  ## everything that must hold: lint, types, tests
	@$(PYTHON_IN) -m tests.support.system_packages test
	@$(PYTHON_IN) -m tests.support.run_all

lint: $(VENV)/.dev-installed  ## ruff and mypy alone
	@$(PYTHON_IN) -m tests.support.run_all --lint-only

bench: $(VENV)/.dev-installed  ## measure against C and Redis, with holders, bursts, hostile peers
	@$(PYTHON_IN) -m tests.support.system_packages bench
	@$(PYTHON_IN) -m tests.bench

soak: $(VENV)/.dev-installed  ## kill the daemon under systemd 5,000 times; takes about an hour
	@$(PYTHON_IN) -m tests.support.system_packages test
	@GPUORCH_SOAK_KILLS=$${GPUORCH_SOAK_KILLS:-5000} $(PYTHON_IN) -m pytest -q -s \
		tests/systemd/test_survival.py

install: $(VENV)/.daemon-installed  ## put daemon, units, scripts and pages under $(DESTDIR)$(PREFIX)
	@$(PYTHON_IN) -m deploy install --destdir '$(DESTDIR)' --prefix '$(PREFIX)' \
		--sysconfdir '$(SYSCONFDIR)' --port '$(PORT)' --interpreter '$(INTERPRETER)' \
		$(if $(filter no,$(ACTIVATE)),--no-activate)

uninstall: $(VENV)/.daemon-installed  ## remove what install put there; configuration and state stay
	@$(PYTHON_IN) -m deploy uninstall --destdir '$(DESTDIR)' --prefix '$(PREFIX)' \
		--sysconfdir '$(SYSCONFDIR)'

lock: $(VENV)/.made  ## resolve all dependencies anew and pin them in requirements.lock
	@$(PYTHON_IN) .ci/lock.py requirements.lock

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second run installs nothing unless a pin or the metadata changed.
$(VENV)/.made: .ci/venv
	@echo "making $(VENV)"
	@.ci/venv $(VENV)
	@touch $@

$(VENV)/.tools-installed: $(VENV)/.made requirements.lock
	@$(INSTALL) pip setuptools
	@touch $@

$(VENV)/.daemon-installed: $(VENV)/.tools-installed $(PINS)
	@echo "installing gpuorchd into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[daemon]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.tools-installed $(PINS)
	@echo "installing gpuorchd and what its tests need into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.daemon-installed
