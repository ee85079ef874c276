#!/usr/bin/env bash
# Replaced token detection: ./rtd.sh NAME [flags, which override the preset]; --help lists names and flags.
# DATA=sample trains on the bundled sample (the default of the tiny models), DATA=wikitext-103 on WikiText-103.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
ROOT=$(unset CDPATH; cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
source "$ROOT/experiments/common.sh"
train RTD "$@"
