#!/usr/bin/env bash
# Keeps a run going until it is done: makes the slice, sets its hosts up, starts the run; if the slice is preempted, makes it
# anew and goes on from the last checkpoint. Runs on your machine; a second start takes over where it finds things.
#
#   watch.sh [--spot|--reserved] --config FILE [--set F=V]...
#
# Before it makes anything it checks the wheel, the settings, the bucket, that the zone has such slices, and, where `apr` is
# installed here, the config. Then it gives up, rather than spend more, when
#   - the command or a setting is wrong (exit status 2);
#   - FAILURES (3) times in a row the run has ended by itself, or its hosts, all up, could not be set up;
#   - SLICE_TRIES (10) requests or slices in a row were refused, preempted or broken. It waits longer after each.
# A checkpoint that the run has saved in between, of a later step than any before of its stage, ends such a row.
#
# --dry-run prints the commands of one round. Settings as for slice.sh, and these two.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
slice=$here/slice.sh

FAILURES=${FAILURES:-3}
SLICE_TRIES=${SLICE_TRIES:-10}
HUNG=75        # Exit status of a run whose step did not move any more (apr_jax/train/watchdog.py).
SILENCES=3      # Looks in a row that a host leaves unanswered, after which the slice is made anew.
LOOKS_A_SAVE=10 # Of this many looks at a run that runs, one is for what it has saved.
need_whole FAILURES SLICE_TRIES

tier=() words=()
for word; do
  case $word in
    --help | -h) show_help ;;
    --spot | --reserved)
      ((${#tier[@]} == 0)) || usage_error "${tier[0]} $word: must be one of --spot and --reserved"
      tier=("$word")
      ;;
    --dry-run) DRY_RUN=1 ;;
    *) words+=("$word") ;;
  esac
done
export DRY_RUN
take_config "${words[@]}"
check_run

if [[ -n $DRY_RUN ]]; then
  "$slice" check "${words[@]}"
  "$slice" create "${tier[@]}"
  "$slice" bootstrap
  "$slice" start "${words[@]}"
  "$slice" status
  say "when the slice is preempted, or a host does not answer $SILENCES times in a row:"
  "$slice" delete
  exit
fi

# A call of slice.sh that may fail; but a wrong command or setting stays wrong.
try() {
  local status=0
  "$slice" "$@" || status=$?
  ((status != 2)) || usage_error "slice.sh $1 refuses its command or a setting (the line above); if there is a slice, it costs: slice.sh delete"
  return "$status"
}

# hear VARIABLE VERB: what slice.sh says.
hear() {
  local said status=0
  said=$(try "$2") || status=$?
  ((status != 2)) || exit 2
  printf -v "$1" %s "$said"
  return "$status"
}

remove() { try delete || say "could not delete ${TPU_NAME:-apr}; trying again"; }

# What the run has saved ends every row of failures: a later step of a stage, for old ones go and come back without any progress.
look_for_progress() {
  local now line stage step
  now=$("$slice" saved 2>/dev/null) || return 0 # Nothing yet, or no answer.
  while IFS= read -r line; do
    [[ $line =~ ^(.+)/checkpoints/([0-9]+)(/commit_success.txt)?$ ]] || continue
    stage=${BASH_REMATCH[1]} step=$((10#${BASH_REMATCH[2]}))
    ((step > ${newest[$stage]:--1})) || continue
    newest[$stage]=$step failed=0 lost=0
  done <<<"$now"
}

# count_failure WHY: of the run, on a slice that is all right.
count_failure() {
  look_for_progress
  failed=$((failed + 1))
  ((failed < FAILURES)) ||
    fail "$1, $failed times, and nothing was saved in between: giving up; slice.sh logs shows why; the slice is still there, and costs"
  say "$1 ($failed of $FAILURES): trying again"
}

# count_lost WHY: a request or a slice.
count_lost() {
  look_for_progress
  lost=$((lost + 1)) failed=0 silent=0
  ((lost < SLICE_TRIES)) ||
    fail "$1, $lost times, and nothing was saved in between: giving up; slice.sh status shows if something is left that costs"
  say "$1 ($lost of $SLICE_TRIES): making it anew"
  for ((turn = 0; turn < lost; turn++)); do pause; done
}

ask_for_slice() {
  local status=0
  try create "${tier[@]}" || status=$?
  ((status != USELESS)) || remove
  if ((status == 0)); then set_up; else count_lost "no slice came of the request"; fi
}

set_up() {
  local status=0
  { try bootstrap && try start "${words[@]}"; } || status=$?
  case $status in
    0) ;;
    "$USELESS") remove && count_lost "a host never came up" ;;
    *) count_failure "the hosts could not be set up" ;;
  esac
}

# Does what the hosts' states ask for: a line of each host, as `slice.sh status` has made sure.
look_after_run() {
  if grep -qx 'exit 2' <<<"$1"; then
    try stop >&2 || true
    usage_error "the run refuses its command or a setting: slice.sh logs shows the line; mend it, and start watch.sh again;" \
      "the slice is still there, and costs"
  elif grep -qx 'exit [1-9][0-9]*' <<<"$1"; then
    # The hosts that wait for the one that hangs end with the same status, or with that of a lost process.
    if grep -qx "exit $HUNG" <<<"$1"; then
      count_failure "a step of the run hung, which slice.sh logs shows"
    else
      count_failure "the run has ended on a host"
    fi
    try stop >&2 || true
    try start "${words[@]}" || true
  elif grep -qx none <<<"$1"; then
    set_up
  elif grep -qx running <<<"$1"; then
    looks=$((looks + 1))
    ((looks % LOOKS_A_SAVE)) || look_for_progress
  elif grep -qx 'exit 0' <<<"$1"; then
    say "done: slice.sh fetch, then slice.sh delete (the slice costs until then)"
    exit
  fi
}

"$slice" check "${words[@]}" >&2
known='' states='' failed=0 lost=0 silent=0 looks=0
declare -A newest=() # Step of each stage.
look_for_progress
while true; do
  hear known state || known=unknown
  case $known in
    ACTIVE)
      if hear states status; then
        silent=0
        look_after_run "$states"
      else
        silent=$((silent + 1))
        say "a host does not answer ($silent of $SILENCES)"
        if ((silent >= SILENCES)); then
          remove
          count_lost "a host is lost"
        fi
      fi
      ;;
    unknown) say "gcloud does not answer; trying again" ;;
    FAILED | SUSPENDING | SUSPENDED)
      remove
      count_lost "the slice is $known (preempted?)"
      ;;
    DELETING) ;;
    *) ask_for_slice ;;
  esac
  pause
done
