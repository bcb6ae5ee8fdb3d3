#!/usr/bin/env bash
# What CI checks besides the tests: format, lint, types, and which layer imports which. Needs .venv (scripts/test.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
run() { echo "+ $*" >&2; "$bin/$@"; }

run ruff format --check .
run ruff check .
run mypy
run lint-imports --no-cache
