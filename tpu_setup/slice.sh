#!/usr/bin/env bash
# A Cloud TPU slice: from nothing to the results of a run, and away again.
#
#   slice.sh create [--spot|--reserved]          ask for the slice, and wait until it is there
#   slice.sh bootstrap                           install the wheel of `make wheel` on every host
#   slice.sh start --config FILE [--set F=V]...  start, or go on with, the run on every host
#   slice.sh logs                                follow what the first host says
#   slice.sh status                              the slice's state, and each host's
#   slice.sh stop                                SIGTERM to every host: the run is saved
#   slice.sh fetch [FOLDER]                      results here; by default into runs/NAME
#   slice.sh delete                              the slice costs until it is deleted; the run in $RUN stays
#
# --dry-run prints each command instead. Settings, all environment variables:
#   TPU_NAME (apr), TPU_ZONE, TPU_TYPE (v5litepod-16), TPU_PROJECT (gcloud's own), TPU_RUNTIME (by TPU_TYPE),
#   RUN (gs://BUCKET/FOLDER), POLL_SECONDS (30), HOST_TRIES (20)
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TPU_NAME=${TPU_NAME:-apr}
HOST_TRIES=${HOST_TRIES:-20}

# The software of a TPU VM, by the table of cloud.google.com/tpu/docs/runtimes.
runtime() {
  case $TPU_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) usage_error "TPU_TYPE=$TPU_TYPE: must be v2-, v3-, v4-, v5litepod-, v5p- or v6e-, and a number" ;;
  esac
}

# queue run|ask VERB WORDS...
queue() { "$1" gcloud compute tpus queued-resources "${@:2}" "${TPU_FLAGS[@]}"; }

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED...; empty if there is none.
state() {
  local known
  known=$(queue ask list --filter="name~/$TPU_NAME\$" --format='value(state.state)')
  echo "${known##*$'\n'}"
}

create() {
  local tier=()
  for flag; do
    case $flag in
      --spot | --reserved) tier=("$flag") ;;
      *) usage_error "create $flag: must be --spot or --reserved" ;;
    esac
  done
  need TPU_TYPE v5litepod-16
  local version known
  version=${TPU_RUNTIME:-$(runtime)}
  known=$(state)
  if [[ -z $known ]]; then
    queue run create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" \
      --runtime-version="$version" "${tier[@]}" ||
      fail "the request for $TPU_TYPE in $TPU_ZONE was refused; if by quota: another zone, --spot, or ask for TPU quota" \
        "at console.cloud.google.com/iam-admin/quotas"
  fi
  wait_active
}

wait_active() {
  local before='' now=''
  while true; do
    now=$(state)
    [[ -n $DRY_RUN ]] && return
    [[ $now == "$before" ]] || say "$TPU_NAME is ${now:-gone}"
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | '')
        queue ask describe "$TPU_NAME" --format='yaml(state)' >&2 || true
        fail "$TPU_NAME is ${now:-gone}, and won't come up: slice.sh delete, then create it again"
        ;;
    esac
    before=$now
    pause
  done
}

# on_hosts all|NUMBER COMMAND
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${TPU_FLAGS[@]}" --ssh-flag=-oConnectTimeout=20 \
    --worker="$1" --command="$2"
}

# of_hosts state|stop: a fresh host has no host.sh yet, and no run.
of_hosts() { on_hosts all "if [ -f apr/host.sh ]; then bash apr/host.sh $1; else echo none; fi"; }

to_hosts() { run gcloud compute tpus tpu-vm scp "$@" "$TPU_NAME:apr/" "${TPU_FLAGS[@]}" --worker=all; }

count_hosts() {
  local addresses
  addresses=$(ask gcloud compute tpus tpu-vm describe "$TPU_NAME" "${TPU_FLAGS[@]}" --format='value(networkEndpoints[].ipAddress)')
  [[ -n $addresses ]] || { [[ -n $DRY_RUN ]] && echo 1; return; }
  tr ';' '\n' <<<"$addresses" | grep -c .
}

# A host may take minutes to let anybody in, and one that never does must be named.
wait_hosts() {
  local try missing number
  for ((try = 1; try <= HOST_TRIES; try++)); do
    on_hosts all 'mkdir -p apr' && return
    say "not all hosts of $TPU_NAME answer yet (try $try of $HOST_TRIES)"
    pause
  done
  missing=''
  number=$(count_hosts)
  for ((host = 0; host < ${number:-0}; host++)); do
    on_hosts "$host" true >/dev/null 2>&1 || missing+=" $host"
  done
  fail "host${missing:- ?} of $TPU_NAME never came up: slice.sh delete, then create it again"
}

bootstrap() {
  local wheel here
  check_run
  wheel=$(newest_wheel)
  here=$(dirname "${BASH_SOURCE[0]}")
  wait_hosts
  to_hosts "$wheel" "$here/host.sh"
  on_hosts all "bash apr/host.sh bootstrap $(printf '%q ' "$(basename "$wheel")" "$RUN")" ||
    fail "a host could not be set up (its lines are above); the same command goes on where it failed"
}

start() {
  check_run
  take_config "$@"
  [[ $RUN == gs://* || $(count_hosts) -eq 1 ]] || say "RUN=$RUN must be a disk that all hosts of $TPU_NAME share"
  to_hosts "$CONFIG"
  on_hosts all "bash apr/host.sh start $(printf '%q ' --config "apr/$(basename "$CONFIG")" --out "$RUN" "${WORDS[@]}")"
}

fetch() {
  check_run
  local target=${1:-runs/$TPU_NAME}
  run mkdir -p "$target"
  fetch_run "$target"
}

arguments=()
for word; do
  if [[ $word == --dry-run ]]; then DRY_RUN=1; else arguments+=("$word"); fi
done
set -- "${arguments[@]}"
verb=${1:---help}
[[ $verb != --help && $verb != -h ]] || show_help
shift
need TPU_ZONE us-west4-a
TPU_FLAGS=(--zone="$TPU_ZONE")
[[ -z ${TPU_PROJECT:-} ]] || TPU_FLAGS+=(--project="$TPU_PROJECT")

case $verb in
  create | bootstrap | start | fetch) "$verb" "$@" ;;
  state) state ;;
  logs) on_hosts 0 'tail -n 200 -F apr/run.log' ;;
  status)
    say "$TPU_NAME is $(state)"
    of_hosts state
    ;;
  stop) of_hosts stop ;;
  delete) queue run delete "$TPU_NAME" --force --quiet ;;
  *) usage_error "$verb: must be create, bootstrap, start, logs, status, stop, fetch or delete; slice.sh --help" ;;
esac
