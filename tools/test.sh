#!/usr/bin/env bash
# ruff, types and the fast tests; --all adds the slow tier and records its result in assets/benchmarks/tests.json.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest
if [ "${1:-}" = "--all" ]; then
    .venv/bin/python tools/slow_tests.py
fi
