#!/usr/bin/env bash
# Runs a training on TPU slices of Google Cloud:  launch/tpu.sh [--dry-run] --settings FILE VERB
#
#   create    ask for the slices            status    of slices and hosts
#   wait      until they are ready          logs      [--host N] [arguments of tail, such as -f]
#   ship      the files that git tracks     stop      save, and end the run; the slices stay
#   install   packages, once per host       teardown  delete the slices; list what still costs money
#   start     train, detached               costs     only list
#   up        the five above                manifest  print a JobSet for GKE
#   watch     up; and again after a         xpk       print commands for XPK
#             preemption, until it is done
#
# Every verb may be repeated: what is there is used, what is done is not done again. --dry-run prints the commands
# and runs none. Exit codes: 0 done; 1 the run failed; 2 a setting is wrong; 3 Google Cloud refused; 4 waited too
# long; 5 a host cannot be reached or prepared; 6 restarts brought no new checkpoint; 7 the slices were lost;
# 143 the run was stopped.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "launch: needs bash 4.4 or newer, this is $BASH_VERSION (macOS: brew install bash)" >&2
  exit 2
fi
unset CDPATH # with it `cd` would print
HERE=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck disable=SC2034 # hosts.sh reads it
ROOT=${HERE%/*}
SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/launch.XXXXXX")
trap 'rm -rf "$SCRATCH"' EXIT
for part in commands settings accelerators hosts watch gke; do
  # shellcheck source=/dev/null
  source "$HERE/$part.sh"
done

usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' "$HERE/tpu.sh"; }

SETTINGS_FILE='' VERB=''
while (($#)); do
  case $1 in
    --dry-run) DRY_RUN=yes ;;
    --settings)
      [[ $# -ge 2 ]] || die 2 "--settings: expected a file"
      SETTINGS_FILE=$2
      shift ;;
    --settings=*) SETTINGS_FILE=${1#*=} ;;
    -h | --help)
      usage
      exit ;;
    -*) die 2 "$(shown "${1%%=*}"): expected --dry-run or --settings FILE before the verb" ;;
    *)
      VERB=$1
      shift
      break ;;
  esac
  shift
done
VERBS=(create wait ship install start up watch status logs stop teardown costs manifest xpk)
[[ -n $VERB && " ${VERBS[*]} " == *" $VERB "* ]] || die 2 "expected one of: ${VERBS[*]}, got '$(shown "$VERB")'"
[[ -n $SETTINGS_FILE ]] || die 2 "expected --settings FILE before the verb; copy launch/example.env"
[[ -f $SETTINGS_FILE && -r $SETTINGS_FILE ]] ||
  die 2 "$(shown "$SETTINGS_FILE") is no file that can be read; copy launch/example.env"
[[ $# -eq 0 || $VERB == logs ]] || die 2 "$VERB: expected no arguments after it, got $#"

read_settings "$SETTINGS_FILE"
describe_accelerator
case $VERB in
  manifest | xpk) check_gke ;;
  *) check_backend ;;
esac
[[ $VERB != xpk || -n $CLUSTER ]] || problem "CLUSTER: needed for xpk"
if [[ -n $SECRETS_FILE ]]; then
  if [[ ! -f $SECRETS_FILE || ! -r $SECRETS_FILE ]]; then
    problem "SECRETS_FILE: $SECRETS_FILE is no file that can be read"
  elif [[ $(ls -dL -l "$SECRETS_FILE") != ????------* ]]; then
    problem "SECRETS_FILE: others may read $SECRETS_FILE; chmod 600 it"
  elif git -C "$(dirname "$SECRETS_FILE")" ls-files --error-unmatch "$(basename "$SECRETS_FILE")" >/dev/null 2>&1; then
    problem "SECRETS_FILE: git tracks $SECRETS_FILE, so it would be shipped with the code"
  else
    read_lines "$SECRETS_FILE" : # the hosts read it alike
  fi
fi
stop_at_problems 2
case $VERB in
  manifest | xpk)
    "$VERB"
    exit ;;
esac
[[ $DRY_RUN == yes ]] || command -v gcloud >/dev/null || die 2 "gcloud is not installed: cloud.google.com/sdk/docs/install"
if [[ $DRY_RUN == no ]]; then # what is edited meanwhile is for the next call
  cp "$SETTINGS_FILE" "$SCRATCH/settings.env"
  SETTINGS_FILE=$SCRATCH/settings.env
fi
# shellcheck source=/dev/null
source "$HERE/backend_${BACKEND//-/_}.sh"
case $VERB in
  create | ship | install | start | up | watch) archive_code ;; # what is wrong with it is told before it costs money
esac
backend_init

# with_slices FUNCTION ARGUMENTS...: for the verbs that need hosts.
with_slices() {
  slice_state
  [[ $STATE == READY || $DRY_RUN == yes ]] || die 5 "the slices are not ready: $STATE_TOLD"
  "$@"
}

trap 'say "launch: interrupted; slices and run go on, and cost money, until teardown"; exit 130' INT TERM
case $VERB in
  create | teardown | costs | watch) "$VERB" ;;
  up)
    up || {
      code=$?
      [[ $code -ne 7 ]] || say "launch: the slices were lost while they came up: $STATE_TOLD; 'watch' starts again by itself"
      exit "$code"
    } ;;
  wait)
    wait_for_slices || {
      code=$?
      [[ $code -ne 7 ]] || say "launch: the slices are lost: $STATE_TOLD"
      exit "$code"
    } ;;
  ship | install | start) with_slices "$VERB" ;;
  status)
    slice_state
    say "launch: $STATE_TOLD"
    if [[ $STATE == READY || $DRY_RUN == yes ]]; then
      status && printf '%s' "${REPLY:+$REPLY
}"
    fi ;;
  stop)
    with_slices stop && printf '%s' "${REPLY:+$REPLY
}" ;;
  logs)
    host=0
    if [[ ${1:-} == --host ]]; then
      [[ ${2:-} =~ ^(0|[1-9][0-9]{0,4})$ && ${2:-} -lt $((SLICES * HOSTS)) ]] ||
        die 2 "--host: expected 0 to $((SLICES * HOSTS - 1)), got '${2:-}'"
      host=$2
      shift 2
    fi
    [[ " $*" != *" --host"* ]] || die 2 "logs: expected --host N before the arguments of tail"
    [[ $# -gt 0 ]] || set -- -n 100
    with_slices logs "$host" "$@" ;;
esac
