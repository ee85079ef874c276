#!/usr/bin/env bash
# Lint, spelling, types and all tests; with COVERAGE=1 their line coverage, too. Sets up what is missing.
# Arguments go to pytest, without coverage: bash tests/run.sh -k masking
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
if (($#)) || [ -z "${COVERAGE-}" ]; then
  exec "$PYTHON" -m pytest "$@"
fi
COVERAGE_FILE=$(mktemp -d)/data  # and a file like it per process
export COVERAGE_FILE
trap 'rm -rf "${COVERAGE_FILE%/*}" || true' EXIT
"$PYTHON" -m coverage run -m pytest
"$PYTHON" -m coverage combine -q
"$PYTHON" -m coverage report
