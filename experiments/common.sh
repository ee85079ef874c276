# What mlm.sh, rtd.sh and tests/run.sh share. To be sourced, with ROOT set to the top of the repository.

log() { echo "$*" >&2; }
die() { log "error: $*"; exit 1; }

# imports_all PYTHON FILE...: whether PYTHON imports every package the requirement files list.
imports_all() {
  local python=$1 modules
  shift
  modules=$(sed -E 's/[[:space:]]*#.*//; s/[=<>!~;[].*//; /^[[:space:]]*$/d; s/-/_/g' "$@" \
    | sed 's/^codespell$/codespell_lib/; s/^scikit_learn$/sklearn/; s/^pytest_xdist$/xdist/; s/^/import /')
  # Not from the current directory, which Python puts first.
  "$python" -c "import sys; sys.path[:] = filter(None, sys.path)"$'\n'"$modules" >/dev/null 2>&1
}

# has_gpu: whether there is an NVIDIA GPU.
has_gpu() { [[ -e /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1; }

# install_cpu_torch: installs the CPU build of the PyTorch in requirements.txt, which is smaller. It is on PyTorch's own
# index alone; where that cannot be reached, a few seconds are lost, and the ordinary build is installed later.
install_cpu_torch() {
  local index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu} torch
  torch=$(sed -nE 's/^(torch==[^[:space:];]+).*/\1/p' "$ROOT/requirements.txt")
  log "no NVIDIA GPU: taking PyTorch's CPU build (200 MB to download, 0.8 GB installed) from $index"
  "$PYTHON" -m pip install --disable-pip-version-check -q --no-deps --index-url "$index" --retries 0 --timeout 10 \
    "$torch" >/dev/null 2>&1 \
    || log "it cannot be had there; taking the build for NVIDIA GPUs from the ordinary index (4.7 GB more)"
}

# set_up_python FILE...: sets PYTHON to one that imports everything the requirement files list. The active Python if it
# does; otherwise .venv, made with it and filled now if need be.
set_up_python() {
  pwd -P >/dev/null 2>&1 || die "the current directory was removed: change to another"
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
  if ! { [[ -x $venv/bin/python ]] && imports_all "$venv/bin/python" "$@"; }; then
    (: >>"$venv.lock") 2>/dev/null || die "$ROOT cannot be written to; activate a Python with the packages of: $*"
    fill_venv "$venv" "$@" 9>>"$venv.lock"
  fi
  PYTHON=$venv/bin/python
}

# fill_venv VENV FILE...: makes VENV with PYTHON if need be, and installs what it lacks. File descriptor 9 is the lock:
# tasks of a job that start together share a checkout.
fill_venv() {
  local venv=$1
  shift
  if command -v flock >/dev/null && ! flock -n 9 2>/dev/null; then
    log "another process may be filling $venv: waiting for it"
    flock 9 2>/dev/null || log "this file system has no locks"
  fi
  if [[ ! -x $venv/bin/python ]]; then
    log "$PYTHON lacks some of: $(basename -a "$@" | xargs); making $venv"
    "$PYTHON" -m venv "$venv" || die "$PYTHON cannot make virtual environments; install its venv module, or use another"
  fi
  local PYTHON=$venv/bin/python
  imports_all "$PYTHON" "$@" && return
  log "installing into $venv (once): $(basename -a "$@" | xargs); up to 5.5 GB with PyTorch for NVIDIA GPUs, else 1 GB"
  "$PYTHON" -c "import torch" >/dev/null 2>&1 || [[ $(uname -s) != Linux ]] || has_gpu || install_cpu_torch
  local arguments=(-r "$ROOT/requirements-hub.txt") file
  for file in "$@"; do arguments+=(-r "$file"); done
  "$PYTHON" -m pip install --disable-pip-version-check -q "${arguments[@]}" \
    || die "installing the requirements failed; run the same command again, or install them yourself and activate that Python"
  imports_all "$PYTHON" "$@" || die "installed, but not importable: $*; remove $venv and try again"
}

# run_with_signals COMMAND...: runs a command, which a signal to this shell alone ends, too. As the first process of a
# container, a shell without traps would ignore the signal.
run_with_signals() {
  local child status stopped=
  "$@" &
  child=$!
  trap 'stopped=129; kill -HUP "$child" || :' HUP
  trap 'stopped=130; kill -TERM "$child" || :' INT  # the command ignores SIGINT, as all that a script starts with &
  trap 'stopped=143; kill -TERM "$child" || :' TERM
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break  # else a signal has interrupted the wait
  done
  trap - HUP INT TERM
  return "${stopped:-$status}"
}

# train TASK [NAME] [FLAG...]: prepares what is missing and trains the preset. FLAGs override it. Python reads them all:
# what to prepare follows from them, and no name, a wrong one, and --help are handled there, too.
train() {
  local task=$1
  shift
  trap '' USR1  # requests a save: until there is something to save, it must end neither this script nor its children
  export PYTHONSAFEPATH=1  # no modules of the current directory (from Python 3.11 on), such as another package DeBERTa
  set_up_python "$ROOT/requirements.txt"
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  set -- --task_name "$task" ${DATA:+--corpus "$DATA"} --preset "$@"
  run_with_signals "$PYTHON" "$ROOT/prepare_data.py" "$@" || exit
  # glibc's cache of small blocks would pin the edges of freed tensors, so that these fit no other: see memory.py.
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.tcache_count=0
  exec "$PYTHON" -m DeBERTa.train "$@"
}
