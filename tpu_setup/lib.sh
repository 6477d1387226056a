# What the scripts of this folder share; sourced, never run.
#
# Settings are environment variables, so that they are said once and not with each command (README.md has the table).
# Every command of a cloud goes through `run` or `ask`: --dry-run prints it instead.
# shellcheck shell=bash

shopt -s inherit_errexit
DRY_RUN=${DRY_RUN:-}
POLL_SECONDS=${POLL_SECONDS:-30}

USELESS=3

# Exit status 1: failed. 2: asked for in a wrong way. 3: the slice is of no use, only a new one helps.
usage_error() {
  echo "${0##*/}: error: $*" >&2
  exit 2
}

fail() {
  echo "${0##*/}: error: $*" >&2
  exit 1
}

useless() {
  echo "${0##*/}: error: $*" >&2
  exit "$USELESS"
}

say() { echo "${0##*/}: $*" >&2; }

# The text that stands at the top of the calling script.
show_help() {
  sed -n '2,/^[^#]/{ s/^# \{0,1\}//p }' "$0"
  exit 0
}

need() {
  local name=$1 example=$2
  [[ -n ${!name:-} ]] || usage_error "\$$name is not set: export $name=$example"
}

# need_whole NAME...: of settings that count something.
need_whole() {
  local name
  for name; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || usage_error "$name=${!name}: must be a whole number, at least 1"
  done
}

# need_host NUMBER: of the verb `logs`.
need_host() {
  [[ $1 =~ ^[0-9]+$ ]] || usage_error "logs $1: must be the number of a host, from 0"
}

print_command() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

# Changes something: printed under --dry-run, else done.
run() {
  if [[ -n $DRY_RUN ]]; then print_command "$@"; else "$@"; fi
}

# Asks for something: under --dry-run printed, and answered with nothing.
ask() {
  if [[ -n $DRY_RUN ]]; then print_command "$@" >&2; else "$@"; fi
}

pause() { [[ -n $DRY_RUN ]] || sleep "$POLL_SECONDS"; }

# The wheel that `make wheel` made last.
newest_wheel() {
  local newest='' wheel
  for wheel in "$(dirname "${BASH_SOURCE[0]}")"/../dist/apr_jax-*.whl; do
    [[ ! -e $wheel || ( -n $newest && $newest -nt $wheel ) ]] || newest=$wheel
  done
  [[ -n $newest ]] || usage_error "dist/ has no wheel of apr_jax: make wheel"
  echo "$newest"
}

# Where the run is kept: every host must see it.
check_run() {
  need RUN gs://BUCKET/paper
  [[ $RUN == gs://* || $RUN == /* ]] ||
    usage_error "RUN=$RUN: must be gs://BUCKET/FOLDER, or the absolute path of a disk that all hosts share"
}

# Splits "--config FILE WORDS..." into $CONFIG and the array $WORDS, further words of `apr reproduce`.
take_config() {
  CONFIG='' WORDS=()
  while (($#)); do
    case $1 in
      --config)
        (($# > 1)) || usage_error "--config: give a file"
        CONFIG=$2 && shift 2
        ;;
      --config=*) CONFIG=${1#*=} && shift ;;
      --dry-run) DRY_RUN=1 && shift ;;
      *) WORDS+=("$1") && shift ;;
    esac
  done
  [[ -n $CONFIG ]] || usage_error "give --config FILE, for example --config experiments/paper.py"
  [[ -f $CONFIG ]] || usage_error "--config $CONFIG: no such file"
}

# All of the run but the optimizers' states (two thirds of its size) and the data.
fetch_bucket() {
  run gcloud storage rsync --recursive --exclude='.*/checkpoints/[0-9]+/state/.*|data/.*' "$RUN" "$1"
}
