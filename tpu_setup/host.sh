#!/usr/bin/env bash
# What runs on a host of a slice, in its folder ~/apr; slice.sh copies it there and calls it.
#
#   host.sh bootstrap WHEEL RUN    environment, package, libtpu; a copy of the data if RUN has them already
#   host.sh start WORDS...         `apr reproduce WORDS` as one of the slice's processes; nothing if it runs already
#   host.sh state                  running, "exit STATUS", or none
#   host.sh stop SECONDS           SIGTERM, and wait until the run is saved; KILL if it takes longer than that
#
# JAX finds the other hosts by itself ("auto"); a test, or another cluster, sets JAX_COORDINATOR_ADDRESS and the others.
set -euo pipefail

folder=$HOME/apr
python=$folder/venv/bin/python
mkdir -p "$folder"
cd "$HOME"

fail() {
  echo "$(hostname): $*" >&2
  exit 1
}

alive() { [[ -f $folder/pid ]] && kill -0 "$(<"$folder/pid")" 2>/dev/null; }

# TPU VMs have Ubuntu 22.04, whose Python is older than jax wants: uv brings a newer one.
make_environment() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -m venv --clear "$folder/venv"
      return
    fi
  done
  python3 -m pip install --quiet --user uv || fail "has no Python 3.11, and pip can't bring uv, which would bring one"
  python3 -m uv venv --quiet --clear --seed --python 3.12 "$folder/venv"
}

bootstrap() {
  local wheel=$folder/$1 run=$2 installed
  installed=$(sha256sum "$wheel")
  if [[ ! -f $folder/installed || $(<"$folder/installed") != "$installed" ]]; then
    "$python" -c '' 2>/dev/null || make_environment
    "$python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "$wheel"
    "$python" -m pip install --quiet --disable-pip-version-check "${wheel}[tpu,gcs,tasks,tensorboard,wandb]"
    "$folder/venv/bin/apr" --help >/dev/null || fail "the package is installed, but does not run"
    echo "$installed" >"$folder/installed"
  fi
  # Here and now, rather than when all chips wait for it.
  "$python" -c 'import sys
from apr_jax.io.storage import as_path, local_copy
data = as_path(sys.argv[1]) / "data"
if (data / "data.json").exists():
    print("data:", local_copy(data, "data.json"))' "$run"
  echo "$(hostname): ready"
}

start() {
  [[ -f $folder/installed ]] || fail "is not set up: slice.sh bootstrap"
  if alive; then
    echo "$(hostname): runs already"
    return
  fi
  rm -f "$folder/exit" "$folder/pid"
  export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-auto}
  echo "== $(date -u +%FT%TZ) apr reproduce $*" >>"$folder/run.log"
  # Of its own session: it lives on when ssh ends. Its files come by rename: who looks finds a whole one or none.
  # shellcheck disable=SC2016 # Expanded by the inner shell.
  setsid nohup bash -c 'folder=$1 && shift
    keep() { echo "$2" >"$folder/$1.new" && mv "$folder/$1.new" "$folder/$1"; }
    "$folder/venv/bin/apr" reproduce "$@" & keep pid $!
    status=0; wait $! || status=$?
    keep exit "$status"' start "$folder" "$@" >>"$folder/run.log" 2>&1 </dev/null &
  for _ in {1..50}; do
    [[ ! -f $folder/pid ]] || ! alive || break
    sleep 0.1
  done
  echo "$(hostname): started; ~/apr/run.log has what it says"
}

state() {
  if alive; then
    echo running
  elif [[ ! -f $folder/pid ]]; then
    echo none
  else
    # The status is written a moment after the end; if it never is, host or memory went with the run.
    for _ in {1..50}; do
      [[ ! -f $folder/exit ]] || break
      sleep 0.1
    done
    echo "exit $(cat "$folder/exit" 2>/dev/null || echo 137)"
  fi
}

# ends_within SECONDS PID
ends_within() {
  local waited
  for ((waited = 0; waited < $1; waited++)); do
    kill -0 "$2" 2>/dev/null || return 0
    sleep 1
  done
  ! kill -0 "$2" 2>/dev/null
}

# It waits for the run that it found: another may be started as soon as that one has ended.
stop() {
  local seconds=$1 pid
  if alive; then
    pid=$(<"$folder/pid")
    kill -TERM "$pid" 2>/dev/null || true
    if ! ends_within "$seconds" "$pid" && kill -KILL "$pid" 2>/dev/null; then
      echo "$(hostname): not ended $seconds s after SIGTERM: killed; what was saved before counts" >&2
      ends_within 10 "$pid" || true
    fi
  fi
  state
}

case ${1:-} in
  bootstrap | start | state | stop) "$@" ;;
  *) fail "host.sh ${1:-}: must be bootstrap, start, state or stop" ;;
esac
