# What the scripts of this folder share; sourced, never run.
#
# Settings are environment variables, so that they are said once and not with each command (README.md has the table).
# Every command of a cloud goes through `run` or `ask`: --dry-run prints it instead.
# shellcheck shell=bash

# First of all: what follows would end an older one with a line that explains nothing.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "${0##*/}: error: bash $BASH_VERSION: must be 4.4 or newer, and first on PATH; macOS has 3.2: brew install bash" >&2
  exit 2
}
shopt -s inherit_errexit
here=$(dirname "${BASH_SOURCE[0]}")
DRY_RUN=${DRY_RUN:-}
POLL_SECONDS=${POLL_SECONDS:-30}

USELESS=3

# Exit status 1: failed. 2: the command or a setting is wrong. 3: the slice is of no use, only a new one helps.
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

# need_switch NAME...: of settings that are on or off; afterwards 1 or empty.
need_switch() {
  local name
  for name; do
    case ${!name:-} in
      1) ;;
      '' | 0) printf -v "$name" '' ;;
      *) usage_error "$name=${!name}: must be 1 (on), or 0 or empty (off)" ;;
    esac
  done
}

# at_most COUNT VERB WORDS...: refuses what would be ignored.
at_most() {
  local count=$1 verb=$2 most='at most one word'
  shift 2
  ((count > 0)) || most=nothing
  (($# <= count)) || usage_error "$verb $*: takes $most more"
  [[ ${1:-} != -* ]] || usage_error "$verb $1: takes no flag but --dry-run"
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

# The wheel that `make wheel` made last; a dry run needs none.
newest_wheel() {
  local newest='' wheel
  for wheel in "$here"/../dist/apr_jax-*.whl; do
    [[ ! -e $wheel || ( -n $newest && $newest -nt $wheel ) ]] || newest=$wheel
  done
  [[ -z $DRY_RUN ]] || newest=${newest:-dist/apr_jax-VERSION-py3-none-any.whl}
  [[ -n $newest ]] || usage_error "dist/ has no wheel of apr_jax: make wheel"
  echo "$newest"
}

# Where the run is kept: every host must see it.
check_run() {
  need RUN gs://BUCKET/paper
  [[ $RUN =~ ^(gs:/)?/[^/] ]] ||
    usage_error "RUN=$RUN: must be gs://BUCKET/FOLDER, or the absolute path of a disk that all hosts share"
  while [[ $RUN == */ ]]; do RUN=${RUN%/}; done # In a bucket x//y is no x/y.
}

# Splits "--config FILE WORDS..." into $CONFIG and the array $WORDS, further words of `apr reproduce`, of which $SETTINGS holds
# what --set is given. Words that `apr reproduce` would refuse are refused here, where nothing costs yet.
take_config() {
  local flag value
  CONFIG='' WORDS=() SETTINGS=()
  while (($#)); do
    flag=${1%%=*} value=${1#*=}
    case $flag in
      --config | --set | --data | --models | --exclude | --only) ;;
      --out) usage_error "$1: the run is kept in \$RUN (now '${RUN:-}'): export RUN=gs://BUCKET/FOLDER instead" ;;
      --scale) usage_error "$1: hosts have no experiments/: give the file, for example --config experiments/paper.py" ;;
      *) usage_error "$1: must be --config FILE, --set FIELD=VALUE, --data PATH, --models RUN, --exclude DATA or --only training|figures; ${0##*/} --help" ;;
    esac
    if [[ $1 == "$flag" ]]; then
      (($# > 1)) || usage_error "$flag: give a value"
      value=$2 && shift
    fi
    shift
    case $flag in
      --config)
        [[ -z $CONFIG ]] || usage_error "--config $value: --config $CONFIG is given already"
        CONFIG=$value
        continue
        ;;
      --set)
        [[ $value == *=* ]] || usage_error "--set $value: must be FIELD=VALUE, for example --set train.sft.steps=200"
        SETTINGS+=("$value")
        ;;
      --only) [[ $value == training || $value == figures ]] || usage_error "--only $value: must be training or figures" ;;
    esac
    WORDS+=("$flag" "$value")
  done
  [[ -n $CONFIG ]] || usage_error "give --config FILE, for example --config experiments/paper.py"
  [[ -f $CONFIG ]] || usage_error "--config $CONFIG: no such file"
}

# The Python of .venv/bin/apr, else of the apr on PATH, whose first line names it; nothing where there is none.
apr_python() {
  local apr=$here/../.venv/bin/apr line=''
  [[ -x $apr ]] || apr=$(command -v apr) || return 0
  IFS= read -r line <"$apr" || true
  line=${line#'#!'}
  [[ $line != *python* || ! -x $line ]] || echo "$line"
}

# Status 3: this Python has no apr_jax. -P, as on the hosts: what a config imports must not come from the folder one stands in.
LOAD='import sys
try:
    from apr_jax.config import ConfigError, load
except ImportError:
    sys.exit(3)
try:
    load(sys.argv[1], sys.argv[2:])
except ConfigError as error:
    sys.exit(str(error))'

# Loads $CONFIG with $SETTINGS, as every host would do once it is paid for.
load_config() {
  local python said status=0
  python=$(apr_python)
  if [[ -n $python ]]; then said=$("$python" -P -c "$LOAD" "$CONFIG" "${SETTINGS[@]}" 2>&1) || status=$?; else status=3; fi
  case $status in
    0) ;;
    3) say "--config $CONFIG and --set were not checked: there is no apr in .venv/bin or on PATH: make venv" ;;
    *) usage_error "$said" ;;
  esac
}

# All of the run but the optimizers' states (two thirds of its size) and the data. Each pattern is of the whole path below $RUN:
# the iterators' states, checkpoints/N/data, come along.
fetch_bucket() {
  run gcloud storage rsync --recursive --exclude='^.*/checkpoints/[0-9]+/state/.*$|^data/.*$' "$RUN" "$1"
}

need_switch DRY_RUN
[[ $POLL_SECONDS =~ ^[0-9]+(\.[0-9]+)?$ && $POLL_SECONDS == *[1-9]* ]] ||
  usage_error "POLL_SECONDS=$POLL_SECONDS: must be seconds, more than 0, for example 30"
