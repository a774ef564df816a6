#!/usr/bin/env bash
# From an empty machine to a one-step generator: sets up, trains, measures, exports and writes a report.
# Further arguments are config overrides, such as seed=1.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
export HF_HUB_OFFLINE=1
exec .venv/bin/fewstep train configs/quickstart.yaml "$@"
