#!/usr/bin/env bash
# Lint, spelling, types and all tests; sets up what is missing. Arguments go to pytest: bash tests/run.sh -k masking
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/experiments/common.sh"
set_up_python "$ROOT/requirements.txt" "$ROOT/tests/requirements.txt"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m codespell_lib
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
