# Every target sets itself up: `make test` and `make quickstart` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test lint format quickstart ablations storyganc unclip clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "dalle_jax needs Python 3.11 to 3.13, this is %d.%d: make setup PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: setup
	$(BIN)/python quickstart.py --run_dir runs/quickstart

ablations: setup
	$(BIN)/python quickstart.py --run_dir runs/quickstart --ablations

storyganc: setup
	$(BIN)/python quickstart.py --run_dir runs/quickstart --storyganc

unclip: setup
	$(BIN)/python train.py --config configs/unclip_shapes.py
	$(BIN)/python evaluate.py --run runs/unclip/unclip --clip runs/unclip/clip --guidance 2 --count 200 --source_arg image_size=72 --out runs/unclip/scores

clean:
	rm -rf .venv runs/quickstart runs/unclip
