#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes: bash benchmarks/gpu.sh OUT
# OUT gets the raw output of every part and results.json, OUT.tar.gz all of it in less than 16 MiB. The card and a
# short table are printed last. A part that fails does not stop the others. --toy: a dry run at small sizes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m benchmarks.gpu "$@"
