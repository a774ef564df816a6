#!/usr/bin/env bash
# The long part of the fault harness, every subject or those named; figures go to assets/benchmarks/soak.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    set -- $(cd tests/faults && grep -l "^def soak(" ./*.py | xargs -n 1 basename -s .py)
fi
for subject in "$@"; do
    .venv/bin/python tools/soak.py "$subject"
done
