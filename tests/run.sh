#!/usr/bin/env bash
# Lint and all tests; sets up what is missing. Arguments go to pytest: bash tests/run.sh -k masking
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/experiments/common.sh"
set_up_python "$ROOT/requirements.txt" "$ROOT/tests/requirements.txt"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
