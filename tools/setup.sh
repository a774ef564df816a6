#!/usr/bin/env bash
# Makes .venv with everything installed, unless it is there already. Needs Python 3.11 or newer.
# The versions are those of tools/constraints.txt, which the tests have run with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    for name in python3.13 python3.12 python3.11 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "fewstep needs Python 3.11 or newer on the PATH" >&2
    exit 2
}

stamp=.venv/.fewstep-installed
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ tools/constraints.txt -nt "$stamp" ]; then
    echo "Setting up .venv (a few minutes, once)..."
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt \
        --editable '.[test]'
    touch "$stamp"
fi
