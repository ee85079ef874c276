#!/usr/bin/env bash
# Record the reference curves of a tiny preset, three seeds: experiments/reference/record.sh deberta-v3-tiny
# It resumes where it was stopped. Flags after the name go to all runs; with those of the preset changed, the runs are
# refused (--reference) in place of the curves that are there.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
ROOT=$(unset CDPATH; cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd)
source "$ROOT/experiments/common.sh"
name=${1:-}
case $name in
  deberta-v3-tiny) script=rtd.sh ;;
  deberta-tiny | bert-tiny) script=mlm.sh ;;
  *) die "no reference curves for '$name': usage: $0 NAME [flags], with NAME one of deberta-v3-tiny, deberta-tiny, bert-tiny" ;;
esac
shift
runs=$ROOT/output/reference/$name
for seed in 1 2 3; do
  "$ROOT/$script" "$name" "$@" --seed "$seed" --output_dir "$runs/seed-$seed"
done
set_up_python "$ROOT/requirements.txt"
cd "$ROOT"
"$PYTHON" -m DeBERTa.report "$runs"/seed-* --html "$runs/comparison.html" --reference --csv "experiments/reference/$name.csv"
