#!/usr/bin/env bash
# A Cloud TPU slice: from nothing to the results of a run, and away again.
#
#   slice.sh check [WORDS of start]              wheel, settings, bucket, the zone's slices, the config; makes nothing
#   slice.sh create [--spot|--reserved]          ask for the slice, and wait until it is there
#   slice.sh bootstrap                           install the wheel of `make wheel` on every host
#   slice.sh start --config FILE [--set F=V]...  start, or go on with, the run on every host
#   slice.sh logs [HOST]                         follow what a host says; by default host 0
#   slice.sh status                              the slice's state, and each host's
#   slice.sh stop                                SIGTERM to every host: the run is saved; KILL after STOP_SECONDS
#   slice.sh saved                               the checkpoints that the run has
#   slice.sh fetch [FOLDER]                      results here; by default into runs/NAME
#   slice.sh delete                              the slice costs until it is deleted; the run in $RUN stays
#
# --dry-run prints each command instead. Settings, all environment variables:
#   TPU_NAME (apr), TPU_ZONE, TPU_TYPE (v5litepod-16), TPU_PROJECT (gcloud's own), TPU_RUNTIME (by TPU_TYPE),
#   RUN (gs://BUCKET/FOLDER), POLL_SECONDS (30), HOST_SECONDS (600), STOP_SECONDS (300)
# Exit status: 1 failed, 2 the command or a setting is wrong, 3 the slice is of no use and must be made anew.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TPU_NAME=${TPU_NAME:-apr}
HOST_SECONDS=${HOST_SECONDS:-600}
STOP_SECONDS=${STOP_SECONDS:-300}
SILENCES=10 # Calls of gcloud in a row that may fail while a request waits in the queue.
need_whole HOST_SECONDS STOP_SECONDS

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
  known=$(queue ask list --filter="name~/$TPU_NAME\$" --format='value(state.state)') || return
  echo "${known##*$'\n'}"
}

check() {
  need TPU_TYPE v5litepod-16
  check_run
  (($# == 0)) || take_config "$@"
  runtime >/dev/null
  newest_wheel >/dev/null
  [[ -n $DRY_RUN ]] || command -v gcloud >/dev/null || usage_error "there is no gcloud here: cloud.google.com/sdk/docs/install"
  (($# == 0)) || load_config
  run gcloud compute tpus tpu-vm accelerator-types describe "$TPU_TYPE" "${TPU_FLAGS[@]}" --format='value(type)' ||
    usage_error "gcloud finds no TPU_TYPE=$TPU_TYPE in TPU_ZONE=$TPU_ZONE (the line above is its own): must be one that" \
      "gcloud compute tpus tpu-vm accelerator-types list --zone=$TPU_ZONE shows to your project"
  [[ $RUN == gs://* ]] || return 0
  local bucket=${RUN#gs://}
  ask gcloud storage ls "gs://${bucket%%/*}" >/dev/null ||
    usage_error "RUN=$RUN: gcloud can't list gs://${bucket%%/*} (the line above is its own): must be a bucket that is open to you"
}

create() {
  local tier=()
  for flag; do
    case $flag in
      --spot | --reserved)
        ((${#tier[@]} == 0)) || usage_error "create ${tier[0]} $flag: must be one of --spot and --reserved"
        tier=("$flag")
        ;;
      *) usage_error "create $flag: must be --spot or --reserved" ;;
    esac
  done
  need TPU_TYPE v5litepod-16
  local version known
  version=${TPU_RUNTIME:-$(runtime)}
  known=$(state)
  if [[ -z $known ]]; then
    queue run create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" \
      --runtime-version="$version" "${tier[@]}" || {
      (($? != 2)) || usage_error "gcloud does not know these words (its line is above): gcloud components update"
      fail "the request for $TPU_TYPE in $TPU_ZONE was refused; if by quota: another zone, --spot, or ask for TPU quota" \
        "at console.cloud.google.com/iam-admin/quotas"
    }
  fi
  wait_active
}

wait_active() {
  local before='' now='' silent=0
  while true; do
    if now=$(state); then
      silent=0
      [[ -n $DRY_RUN ]] && return
      [[ $now == "$before" ]] || say "$TPU_NAME is ${now:-gone}"
      case $now in
        ACTIVE) return ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING | '')
          queue ask describe "$TPU_NAME" --format='yaml(state)' >&2 || true
          useless "$TPU_NAME is ${now:-gone}, and won't come up: slice.sh delete, then create it again"
          ;;
      esac
      before=$now
    else
      silent=$((silent + 1))
      ((silent < SILENCES)) || fail "gcloud has not answered $silent times in a row; the request stands: slice.sh create waits on"
      say "gcloud does not answer ($silent of $SILENCES)"
    fi
    pause
  done
}

# on_hosts all|NUMBER COMMAND. Its status is that of the command, but for 2, which here would say wrong use.
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${TPU_FLAGS[@]}" --ssh-flag=-oConnectTimeout=20 \
    --worker="$1" --command="$2" || return $(($? == 2 ? 1 : $?))
}

# of_hosts WORDS...: host.sh with these; a fresh host has none yet, and no run.
of_hosts() { on_hosts all "if [ -f apr/host.sh ]; then bash apr/host.sh $*; else echo none; fi"; }

to_hosts() { run gcloud compute tpus tpu-vm scp "$@" "$TPU_NAME:apr/" "${TPU_FLAGS[@]}" --worker=all; }

count_hosts() {
  local addresses
  addresses=$(ask gcloud compute tpus tpu-vm describe "$TPU_NAME" "${TPU_FLAGS[@]}" --format='value(networkEndpoints[].ipAddress)')
  [[ -n $addresses ]] || { [[ -n $DRY_RUN ]] && echo 1; return; }
  tr ';' '\n' <<<"$addresses" | grep -c .
}

# A host may take minutes to let anybody in, and one that never does must be named. Seconds, not looks: gcloud itself tries ten
# times before it says that a host is silent, which takes some 4 minutes.
wait_hosts() {
  local end=$((SECONDS + HOST_SECONDS)) missing number
  while true; do
    on_hosts all 'mkdir -p apr' && return
    ((SECONDS < end)) || break
    say "not all hosts of $TPU_NAME answer yet; waiting for $((end - SECONDS)) s more"
    pause
  done
  missing=''
  number=$(count_hosts)
  for ((host = 0; host < ${number:-0}; host++)); do
    on_hosts "$host" true >/dev/null 2>&1 || missing+=" $host"
  done
  useless "host${missing:- ?} of $TPU_NAME never came up: slice.sh delete, then create it again"
}

bootstrap() {
  local wheel
  check_run
  wheel=$(newest_wheel)
  wait_hosts
  to_hosts "$wheel" "$here/host.sh"
  on_hosts all "bash apr/host.sh bootstrap $(printf '%q ' "$(basename "$wheel")" "$RUN")" ||
    fail "a host could not be set up (its lines are above); the same command goes on where it failed"
}

start() {
  check_run
  take_config "$@"
  load_config
  [[ $RUN == gs://* || $(count_hosts) -eq 1 ]] || say "RUN=$RUN must be a disk that all hosts of $TPU_NAME share"
  to_hosts "$(dirname "$CONFIG")"/*.py # The config may name a file of tasks beside it.
  on_hosts all "bash apr/host.sh start $(printf '%q ' --config "apr/$(basename "$CONFIG")" --out "$RUN" "${WORDS[@]}")" ||
    fail "a host could not start the run (its lines are above)"
}

logs() {
  local host=${1:-0}
  need_host "$host"
  on_hosts "$host" 'tail -n 200 -F apr/run.log'
}

# Each host's state, a line each: fewer lines than hosts are no answer, whatever gcloud's own status is.
status() {
  local states hosts heard status=0
  say "$TPU_NAME is $(state)"
  states=$(of_hosts state) || status=$?
  echo "$states"
  ((status == 0)) || return "$status"
  [[ -z $DRY_RUN ]] || return 0
  hosts=$(count_hosts) || fail "gcloud does not tell how many hosts $TPU_NAME has"
  heard=$(grep -cxE 'none|running|exit [0-9]+' <<<"$states") || true
  ((heard == hosts)) || fail "$heard of the $hosts hosts of $TPU_NAME have said none, running or exit STATUS"
}

# Whole ones only: Orbax ends a save with this file in a bucket, and by renaming the folder to its number on a disk.
saved() {
  check_run
  case $RUN in
    gs://*) run gcloud storage ls "$RUN/*/*/checkpoints/*/commit_success.txt" ;;
    *) on_hosts 0 "ls -d $(printf '%q' "$RUN")/*/*/checkpoints/* | grep -x '.*/[0-9]*'" ;;
  esac
}

fetch() {
  check_run
  local target=${1:-runs/$TPU_NAME} pack
  run mkdir -p "$target"
  case $RUN in
    gs://*) fetch_bucket "$target" ;;
    *)
      pack="tar -C $(printf '%q' "$RUN") --exclude='./data' --exclude='./*/*/checkpoints/*/state' -cf - ."
      if [[ -n $DRY_RUN ]]; then
        on_hosts 0 "$pack"
      else
        on_hosts 0 "$pack" | tar -C "$target" -xf - || fail "RUN=$RUN could not be copied from host 0 (the lines above say why)"
      fi
      ;;
  esac
}

delete() { queue run delete "$TPU_NAME" --force --quiet; }

arguments=()
for word; do
  if [[ $word == --dry-run ]]; then DRY_RUN=1; else arguments+=("$word"); fi
done
set -- "${arguments[@]}"
verb=${1:---help}
[[ $verb != --help && $verb != -h ]] || show_help
shift
case $verb in
  check | create | start) ;;
  logs | fetch) at_most 1 "$verb" "$@" ;;
  bootstrap | state | status | stop | saved | delete) at_most 0 "$verb" "$@" ;;
  *) usage_error "$verb: must be check, create, bootstrap, start, logs, status, stop, saved, fetch or delete; slice.sh --help" ;;
esac
need TPU_ZONE us-west4-a
TPU_FLAGS=(--zone="$TPU_ZONE")
[[ -z ${TPU_PROJECT:-} ]] || TPU_FLAGS+=(--project="$TPU_PROJECT")
if [[ $verb == stop ]]; then of_hosts stop "$STOP_SECONDS"; else "$verb" "$@"; fi
