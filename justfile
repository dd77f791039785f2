# Two commands on a fresh machine: `pip install rust-just`, then any recipe here.

python := env("PYTHON", "python3")
bin := ".venv/bin"

# Show the recipes.
default:
    @just --list

# Make .venv and install everything that is pinned in constraints.txt, once.
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    stamp=.venv/.installed
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
        [ -x {{ bin }}/python ] || {{ python }} -m venv .venv
        {{ bin }}/python -m pip install --quiet --upgrade pip
        {{ bin }}/python -m pip install --quiet -c constraints.txt -e ".[test]"
        touch "$stamp"
    fi

# Run the tests; arguments go to pytest.
test *args: setup
    {{ bin }}/python -m pytest -n auto {{ args }}

# Fine-tune the shipped model with one method on rotated digits: just bench-variant jora --seeds 3
bench-variant variant *args: setup
    {{ bin }}/lora-lite bench {{ variant }} {{ args }}

# The same for every method.
bench-all *args: setup
    {{ bin }}/lora-lite bench-all {{ args }}

# Time a training step with each method, beside the frozen model and PEFT: just cost --variants lora
cost *args: setup
    {{ bin }}/lora-lite cost {{ args }}

# Write README's tables and the plots again from results/.
report: setup
    {{ bin }}/lora-lite report

# Train the model that the benchmark starts from, and ship it.
pretrain: setup
    {{ bin }}/python -m lora_lite.bench.pretrain

# Check the style.
lint: setup
    {{ bin }}/ruff check .
    {{ bin }}/ruff format --check .

# Make a wheel in dist/.
build: setup
    {{ bin }}/python -m pip wheel --quiet --no-deps --wheel-dir dist .
