#!/usr/bin/env bash
# ruff, types and the fast tests; with --all the slow tier too, its result recorded in assets/benchmarks/tests.json.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ "${1:-}" = "--all" ]; then
    .venv/bin/python tools/slow_tests.py
else
    .venv/bin/python -m pytest -n 2 --dist loadfile
fi
