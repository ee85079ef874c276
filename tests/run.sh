#!/usr/bin/env bash
# Lint, spelling, types and all tests; with COVERAGE=1 their line coverage, too. Sets up what is missing.
# Arguments go to pytest, without coverage: bash tests/run.sh -k masking
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
ROOT=$(unset CDPATH; cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
source "$ROOT/experiments/common.sh"
set_up_python "$ROOT/requirements.txt" "$ROOT/tests/requirements.txt"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m codespell_lib
"$PYTHON" -m mypy
if (($#)); then
  exec "$PYTHON" -m pytest "$@"
fi
run=("$PYTHON" -m)
if [ -n "${COVERAGE-}" ]; then
  COVERAGE_FILE=$(mktemp -d)/data  # and a file like it per process
  export COVERAGE_FILE
  trap 'rm -rf "${COVERAGE_FILE%/*}" || true' EXIT
  run+=(coverage run -m)
fi
# A process per core, each with one thread: threads of several would wait for each other. Tests of threads set their number.
export OMP_NUM_THREADS=1
"${run[@]}" pytest -n auto --maxprocesses 8 --dist worksteal --ignore tests/gpu
"${run[@]}" pytest tests/gpu  # apart: they measure and fill the memory of the GPU
if [ -n "${COVERAGE-}" ]; then
  "$PYTHON" -m coverage combine -q
  "$PYTHON" -m coverage report
fi
