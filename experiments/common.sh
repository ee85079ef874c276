# What mlm.sh, rtd.sh and tests/run.sh share. To be sourced, with ROOT set to the top of the repository.

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 1; }

# imports_all PYTHON FILE...: whether PYTHON imports every package the requirement files list.
imports_all() {
  local python=$1 modules
  shift
  modules=$(sed -E 's/[[:space:]]*#.*//; s/[=<>!~;[].*//; /^[[:space:]]*$/d; s/-/_/g' "$@" | sed 's/^/import /')
  "$python" -c "$modules" >/dev/null 2>&1
}

# set_up_python FILE...: sets PYTHON to one that imports everything the requirement files list. The active Python if it
# does; otherwise .venv, made with it and filled now if need be.
set_up_python() {
  local candidate
  PYTHON=
  for candidate in python python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      PYTHON=$(command -v "$candidate")
      break
    fi
  done
  [[ -n $PYTHON ]] || die "no Python 3.10 or newer found as python or python3; install one, or activate its environment"
  imports_all "$PYTHON" "$@" && return

  local venv=$ROOT/.venv
  if [[ ! -x $venv/bin/python ]]; then
    say "$PYTHON lacks some of: $(basename -a "$@" | xargs); making $venv"
    "$PYTHON" -m venv "$venv" || die "$PYTHON cannot make virtual environments; install its venv module, or use another"
  fi
  PYTHON=$venv/bin/python
  imports_all "$PYTHON" "$@" && return
  say "installing into $venv (once)"
  local arguments=() file
  for file in "$@"; do arguments+=(-r "$file"); done
  "$PYTHON" -m pip install --disable-pip-version-check -q "${arguments[@]}" \
    || die "installing the requirements failed; run the same command again, or install them yourself and activate that Python"
  imports_all "$PYTHON" "$@" || die "installed, but not importable: $*; remove $venv and try again"
}

# flag_value NAME DEFAULT ARGUMENT...: the last value of --NAME, which may be shortened, among the arguments.
flag_value() {
  local name=$1 value=$2 flag
  shift 2
  while (($#)); do
    flag=${1%%=*}
    if [[ $flag == --?* && --$name == "$flag"* ]]; then
      if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2-}; fi
    fi
    shift
  done
  echo "$value"
}

# usage PROGRAM NAMES...: what may be given, on stderr; exit status 2.
usage() {
  local program=$1
  shift
  say "usage: $program NAME [flags of python -m DeBERTa.train]"
  say "NAME is one of: $*"
  say "DATA=sample trains on the bundled sample (the default of the tiny models), DATA=wikitext-103 on WikiText-103."
  exit 2
}

# train NAME TASK SEQ_LENGTH DATA PRESET... -- FLAG...: prepares what is missing and trains. FLAGs come last and win.
train() {
  local name=$1 task=$2 length=$3 data=$4 preset=()
  shift 4
  while [[ $1 != -- ]]; do
    preset+=("$1")
    shift
  done
  shift
  length=$(flag_value max_seq_length "$length" "$@")
  local cache=${DEBERTA_CACHE:-$HOME/.cache/DeBERTa}

  trap '' USR1  # asks for a save: until there is something to save, it must end neither this script nor what it starts
  set_up_python "$ROOT/requirements.txt"
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  [[ " $* " != *" --help "* && " $* " != *" -h "* ]] || exec "$PYTHON" -m DeBERTa.train --help
  # Wrong flags are told before anything is fetched or prepared.
  "$PYTHON" -c 'import sys; from DeBERTa.train import parse_flags; parse_flags(sys.argv[1:])' "$@" || exit
  if [[ -z $(flag_value data_dir "" "$@") ]]; then
    case $data in
      sample)
        "$PYTHON" "$ROOT/prepare_data.py" --corpus sample --train_vocab 8000 --max_seq_length "$length" || exit
        preset+=(--vocab_path "$cache/sample/spm.model" --vocab_size 8064)
        ;;
      wikitext-103)
        "$PYTHON" "$ROOT/prepare_data.py" --max_seq_length "$length" || exit
        preset+=(--vocab_path "$cache/deberta-v3-base/spm.model")
        ;;
      *) die "DATA=$data: expected sample or wikitext-103 (your own text: --data_dir and --vocab_path)" ;;
    esac
    preset+=(--data_dir "$cache/$data/$length")
  fi
  # glibc's cache of small blocks would pin the edges of freed tensors, so that these fit no other: see memory.py.
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.tcache_count=0
  exec "$PYTHON" -m DeBERTa.train --task_name "$task" --tag "$name" \
    --do_train --max_seq_length "$length" "${preset[@]}" "$@"
}
