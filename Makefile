# make demo   install, run the whole pipeline on the embedded defaults, print the result table
# make test   install, run the tests
# make airflow   install, start Airflow with the DAGs on this machine
SHELL := /bin/bash
.DEFAULT_GOAL := help
# Bytecode is kept: without it every stage compiles its libraries anew (4 s).
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help demo airflow worker test install install-all openblas lint format bench bench-quality bench-mac bars mlflow table clean lock parity preset

UV_VERSION := 0.13.9
# An existing uv is used; otherwise one is put into .uv/, from PyPI. Outside this folder only uv's cache grows (~/.cache/uv).
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.uv/bin/uv:
	@echo "installing uv into .uv/"
	@python3 -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

openblas:
	@bash docker/install-openblas.sh

install: openblas $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv)  ## install into .venv what uv.lock pins
	@$(UV) sync --locked --inexact --quiet
	@bash docker/precompile-mlx-header.sh .venv/bin/python

install-all: install  ## install what Airflow's side needs as well
	@$(UV) sync --locked --inexact --quiet --group orchestration

# Records go to MLflow once, at the end: uploads in the background would take the cores from the stages.
demo: install  ## run the whole pipeline (train, distil, calibrate, search, evaluate) and print the table
	@$(RUN) ADO_SYNC=manual dvc repro
	@$(RUN) python -m ado_tasks sync
	@$(RUN) python -m ado_tasks compare

NAME ?= shapes16
PRESET = .ado/presets/$(NAME)
preset: install  ## run the graph with params.NAME.yaml (NAME=shapes16) in .ado/presets/NAME; goes on where it stopped
	@test -f params.$(NAME).yaml || { echo "no params.$(NAME).yaml; there is: $$(ls params.*.yaml)" >&2; exit 2; }
	@test -d $(PRESET) || git clone --quiet . $(PRESET)
	@git -C $(PRESET) fetch --quiet && git -C $(PRESET) reset --quiet --hard FETCH_HEAD
	@cp params.$(NAME).yaml $(PRESET)/params.yaml
	@cd $(PRESET) && $(RUN) python -m ado_tasks.graph --methods-of params.yaml
	@cd $(PRESET) && $(RUN) ADO_SYNC=manual dvc repro && $(RUN) python -m ado_tasks sync && $(RUN) python -m ado_tasks compare

table:  ## print the table of the last run again
	@$(RUN) python -m ado_tasks compare

test: install-all  ## run the tests
	@$(RUN) python -m pytest -m "not bars" -n 2 --dist loadfile --no-loadscope-reorder

lint: install-all  ## linters, types, layers
	@$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) pyright && $(RUN) lint-imports

format: install  ## rewrite the code in the house format
	@$(RUN) ruff check --fix . ; $(RUN) ruff format .

parity:  ## install PyTorch and Diffusers for the live parity tests (never needed by a user)
	@bash tests/install-parity.sh

bench: install  ## speed of a training step against PyTorch, in turn
	@$(RUN) python bench/train_step.py

# BENCH: options, such as BENCH=--quick or BENCH="--workspace .ado/presets/shapes16".
BENCH ?=
bench-quality: install parity  ## quality against evaluations and milliseconds: our variants, Diffusers' schedulers on the same weights
	@$(RUN) python bench/quality.py $(BENCH)

# Without PyTorch its parts are skipped, and the report says so.
bench-mac: install  ## MLX against PyTorch and the whole chain against its teacher on this machine: a report to contribute (BENCH=--quick, --full)
	@bash tests/install-parity.sh || echo "PyTorch was not installed: its parts are skipped"
	@$(RUN) python bench/mac.py $(BENCH)

bars: install  ## the full-size checks, too long for CI
	@$(RUN) python -m pytest -m bars -s
	@$(RUN) python bench/statistics_coverage.py --trials 1000
	@$(MAKE) --no-print-directory demo
	@$(RUN) python bench/usual_grids.py
	@$(MAKE) --no-print-directory preset NAME=shapes16

mlflow: install  ## look at the recorded runs in a browser
	@$(RUN) python -m ado_tasks sync
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true $(RUN) \
		mlflow server --backend-store-uri sqlite:///$(CURDIR)/.ado/mlflow.db --host 127.0.0.1 --port 5000 --workers 1

airflow: install-all  ## Airflow with the DAGs on this machine, until Ctrl-C (SQLite, no account; ado.env.example says what can be set)
	@$(RUN) exec python -m ado_tasks.orchestration.launch airflow

worker: install-all  ## join this machine to an Airflow as a worker, until Ctrl-C (ado.env names the Airflow, the queue, the secret)
	@$(RUN) exec python -m ado_tasks.orchestration.launch worker

lock:  ## renew uv.lock and the versions that DVC watches
	@$(UV) lock
	@$(RUN) python -m ado_tasks.versions --write

clean:  ## remove what runs made (data, models, reports, records); .venv, dvc.lock and .dvc/cache stay
	rm -rf data features models schedules anchor reports .ado
