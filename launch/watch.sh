# shellcheck shell=bash
# From settings to a run that goes on: create, wait, start; and again when the slices are preempted.

# create: slices are there, or asked for, when this returns; what is left of failed ones is deleted first.
create() {
  tell_accelerator
  slice_state
  case $STATE in
    WAITING | READY)
      say "launch: $NAME is there: $STATE_TOLD"
      return ;;
    LOST | FAILED)
      say "launch: $NAME is of no use: $STATE_TOLD"
      delete_slices || die 3 "$NAME could not be deleted" ;;
  esac
  wait_while DELETING
  create_slices || exit
}

# wait_while STATE: polls for up to WAIT_SECONDS.
wait_while() {
  local since=$SECONDS last=''
  while [[ $STATE == "$1" ]]; do
    if [[ $STATE_TOLD != "$last" ]]; then
      say "launch: $(stamp)$STATE_TOLD"
      last=$STATE_TOLD
    fi
    ((SECONDS - since < WAIT_SECONDS)) ||
      die 4 "waited for $WAIT_SECONDS s (WAIT_SECONDS), and it is still so: $STATE_TOLD. It stays asked for: \
'wait' goes on waiting, 'teardown' gives up"
    sleep "$POLL_SECONDS"
    slice_state
  done
}

# wait_for_slices: status 0 when all are ready, 7 where they were lost meanwhile.
wait_for_slices() {
  slice_state
  [[ $DRY_RUN == no ]] || return 0
  wait_while WAITING
  case $STATE in
    READY) say "launch: ready: $STATE_TOLD" ;;
    LOST) return 7 ;;
    ABSENT) die 3 "$NAME does not exist; 'create' makes it" ;;
    FAILED)
      refused "$STATE_TOLD
$(told_of_failure)" || exit ;;
    *) die 3 "$NAME: $STATE_TOLD" ;;
  esac
}

# up: everything that is needed for the run to go on; what is done already is not done again.
up() {
  create
  wait_for_slices || return
  ship || return
  install || return
  start
}

# watch: until the run has ended. Exit codes: see tpu.sh.
watch() {
  local code idle=0 progress=none before=none
  PATIENCE=100 # a network that is gone for a while does not end it
  while :; do
    code=0
    up || code=$?
    if [[ $code -eq 5 ]]; then
      slice_state
      [[ $STATE == READY ]] || code=7 # no wonder that they do not answer
    fi
    [[ $DRY_RUN == no ]] || return 0
    [[ $code -ne 0 ]] || follow || code=$?
    case $code in
      0) ended 0 "the run is done: $RUN_DIR" ;;
      1) ended 1 "the run failed; 'logs' shows why, and $RUN_DIR.logs keeps them" ;;
      143) ended 143 "the run was stopped; the same command goes on" ;;
    esac
    if [[ $progress != "$before" ]]; then
      idle=0 before=$progress
    fi
    if ((idle >= MAX_IDLE_RESTARTS)); then
      [[ $code -ne 5 ]] || ended 5 "not all hosts could be prepared; what they said is above"
      ended 6 "no new checkpoint after $idle restarts (MAX_IDLE_RESTARTS), the newest is $progress: gives up"
    fi
    idle=$((idle + 1))
    say "launch: $(stamp)not running: $STATE_TOLD; goes on from the newest checkpoint, as far as known $progress"
  done
}

# follow: until the run has ended or its hosts are lost; keeps watch's progress. Status 0: it is done; 1: it
# failed; 143: it was stopped; 7: it has to be started again.
follow() {
  local told='' silent=0 found
  while :; do
    sleep "$POLL_SECONDS"
    slice_state
    case $STATE in
      READY) ;;
      WAITING) # in maintenance
        wait_while WAITING
        return 7 ;;
      *) return 7 ;;
    esac
    if ! status 1; then # the next look at the slices tells whether they are lost
      silent=$((silent + 1))
      ((silent < PATIENCE)) || ended 5 "hosts do not answer, though the slices are ready"
      continue
    fi
    silent=0
    found=$(sed -n 's/.* progress=//p' <<<"$REPLY" | grep -v unknown | tail -n 1) || true
    progress=${found:-$progress}
    if [[ $REPLY != "$told" ]]; then
      told=$REPLY
      say "$told"
    fi
    if grep -q '^@host [^ ]* running' <<<"$told"; then
      continue # also where others have ended: they end together
    elif grep -q '^@host [^ ]* failed' <<<"$told"; then
      sleep "$POLL_SECONDS"
      slice_state # a host that is gone makes the others fail
      [[ $STATE == READY ]] || return 7
      return 1
    elif grep -q '^@host [^ ]* stopped' <<<"$told"; then
      return 143
    elif grep -q '^@host [^ ]* idle' <<<"$told"; then
      return 7
    fi
    return 0
  done
}

# ended CODE TEXT: the end of watch.
ended() {
  say "launch: $2"
  if [[ $TEARDOWN_WHEN_DONE == yes && $1 =~ ^(0|1|6)$ ]]; then
    teardown || exit
  else
    say "launch: the slices stay, and cost money, until 'teardown'"
  fi
  exit "$1"
}

# teardown: deletes the slices, and tells what is left.
teardown() {
  slice_state
  local code=0
  if [[ $STATE != ABSENT || $DRY_RUN == yes ]]; then
    delete_slices || code=$?
    [[ $DRY_RUN == yes ]] || slice_state
  fi
  costs
  if [[ $STATE != ABSENT && $DRY_RUN == no ]]; then
    say "launch: $NAME is NOT gone, and may still cost money: $STATE_TOLD"
    return 3
  fi
  return "$code"
}

# costs: what there is in the zone and may cost money, not only of this run.
costs() {
  say "launch: what there is in $ZONE of $PROJECT; anything listed here may cost money:"
  list_resources
  run gcloud compute instances list "--project=$PROJECT" "--zones=$ZONE"
  run gcloud compute disks list "--project=$PROJECT" "--zones=$ZONE"
  [[ -z $SHARED_SOURCE ]] || say "launch: not listed, and stays: the storage $SHARED_SOURCE with $RUN_DIR"
}
