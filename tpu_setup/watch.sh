#!/usr/bin/env bash
# Keeps a run going until it is done: makes the slice, sets its hosts up, starts the run; if the slice is preempted, makes it
# anew and goes on from the last checkpoint. Runs on your machine; a second start takes over where it finds things.
#
#   watch.sh [--spot|--reserved] --config FILE [--set F=V]...
#
# --dry-run prints the commands of one round. Settings as for slice.sh, and FAILURES (3): so many ends of the run itself (not
# of the slice) in a row give up; a wrong flag or config (exit status 2) does so at once.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
slice=$(dirname "${BASH_SOURCE[0]}")/slice.sh

FAILURES=${FAILURES:-3}
tier=() words=()
for word; do
  case $word in
    --help | -h) show_help ;;
    --spot | --reserved) tier=("$word") ;;
    --dry-run) DRY_RUN=1 ;;
    *) words+=("$word") ;;
  esac
done
export DRY_RUN
take_config "${words[@]}"
check_run

remove() {
  "$slice" delete || say "could not delete ${TPU_NAME:-apr}; trying again"
  pause
}

bring_up() {
  "$slice" create "${tier[@]}" && "$slice" bootstrap && "$slice" start "${words[@]}"
}

if [[ -n $DRY_RUN ]]; then
  bring_up
  "$slice" status
  say 'when the slice is preempted, or a host does not answer three times in a row:'
  "$slice" delete
  exit
fi

failed=0 silent=0
while true; do
  known=$("$slice" state || echo unknown)
  case $known in
    ACTIVE) ;;
    unknown)
      say "gcloud does not answer; trying again"
      pause
      continue
      ;;
    FAILED | SUSPENDING | SUSPENDED)
      say "the slice is $known (preempted?): making it anew"
      failed=0
      remove
      continue
      ;;
    DELETING)
      pause
      continue
      ;;
    *)
      "$slice" create "${tier[@]}" || pause
      continue
      ;;
  esac
  if ! states=$("$slice" status); then
    silent=$((silent + 1))
    say "a host does not answer ($silent of 3)"
    if ((silent >= 3)) && [[ $("$slice" state || echo unknown) == ACTIVE ]]; then
      say "a host is lost: making the slice anew"
      remove
      silent=0
    fi
    pause
    continue
  fi
  silent=0
  if grep -qx 'exit 2' <<<"$states"; then
    "$slice" stop >&2 || true
    fail "the run was asked for in a wrong way: slice.sh logs shows the line; mend it, and start watch.sh again"
  elif grep -qx 'exit [1-9][0-9]*' <<<"$states"; then
    failed=$((failed + 1))
    ((failed < FAILURES)) || fail "the run has failed $failed times: slice.sh logs shows why; the slice is still there, and costs"
    say "the run has ended on a host ($failed of $FAILURES): starting it again"
    "$slice" stop >&2 || true
    "$slice" start "${words[@]}" || true
  elif grep -qx none <<<"$states"; then
    if ! "$slice" bootstrap || ! "$slice" start "${words[@]}"; then
      say "the hosts could not be set up; trying again"
    fi
  elif ! grep -qx running <<<"$states"; then
    say "done: slice.sh fetch, then slice.sh delete (the slice costs until then)"
    exit
  fi
  pause
done
