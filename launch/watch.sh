# shellcheck shell=bash
# From settings to a run that goes on: create, wait, start; and again when the slices are preempted.

# create: slices are there, or asked for, when this returns; what is left of failed ones is deleted first.
create() {
  tell_accelerator
  slice_state
  case $STATE in
    READY)
      say "launch: $NAME is there: $STATE_TOLD"
      return ;;
    WAITING)
      say "launch: $NAME is there: $STATE_TOLD"
      # Of several parts some may be missing, where an earlier attempt was interrupted.
      [[ $BACKEND != gce ]] || create_slices
      return ;;
    OTHER) die 3 "$NAME exists, and is not what the settings say: $STATE_TOLD. 'teardown' first, or another NAME" ;;
    LOST | FAILED)
      say "launch: $NAME is of no use: $STATE_TOLD"
      delete_slices || {
        say "launch: $NAME could not be deleted"
        return 3
      } ;;
  esac
  wait_while DELETING || return
  create_slices
}

# wait_while STATE: polls for up to WAIT_SECONDS; status 4: it is still so.
wait_while() {
  local since=$SECONDS last=''
  while [[ $STATE == "$1" ]]; do
    if [[ $STATE_TOLD != "$last" ]]; then
      say "launch: $(stamp)$STATE_TOLD"
      last=$STATE_TOLD
    fi
    ((SECONDS - since < WAIT_SECONDS)) || {
      say "launch: waited for $WAIT_SECONDS s (WAIT_SECONDS), and it is still so: $STATE_TOLD. It stays asked for until \
'teardown'; 'wait' goes on waiting"
      return 4
    }
    sleep "$POLL_SECONDS"
    slice_state
  done
}

# wait_for_slices: status 0 when all are ready, 3 where they were refused, 4 when that takes too long, 7 where they
# were lost meanwhile.
wait_for_slices() {
  slice_state
  [[ $DRY_RUN == no ]] || return 0
  wait_while WAITING || return
  case $STATE in
    READY) say "launch: ready: $STATE_TOLD" ;;
    LOST) return 7 ;;
    ABSENT) die 3 "$NAME does not exist; 'create' makes it" ;;
    FAILED)
      refused "$STATE_TOLD
$(told_of_failure)" ;;
    *) die 3 "$NAME: $STATE_TOLD" ;;
  esac
}

# up: everything that is needed for the run to go on; what is done already is not done again.
up() {
  create || return
  wait_for_slices || return
  ship || return
  install || return
  start
}

# watch: until the run has ended. Exit codes: see tpu.sh.
watch() {
  local code idle=0 progress=none before=none started=no refusal=no turn
  PATIENCE=100 # a network that is gone for a while does not end it
  while :; do
    code=0
    up || code=$?
    if [[ $code -eq 5 ]]; then
      slice_state
      [[ $STATE == READY ]] || code=7 # no wonder that they do not answer
    fi
    [[ $DRY_RUN == no ]] || return 0
    if [[ $code -eq 0 ]]; then
      started=yes
      follow || code=$?
    fi
    refusal=no
    case $code in
      0) ended 0 "the run is done: $RUN_DIR" ;;
      1) ended 1 "the run failed; 'logs' shows why, and $RUN_DIR.logs keeps them" ;;
      143) ended 143 "the run was stopped; the same command goes on" ;;
      4) ended 4 "there is no capacity for $NAME as yet" ;;
      3)
        [[ $started == yes ]] || exit 3
        refusal=yes ;; # what Google Cloud had granted before it may grant again
    esac
    if [[ $progress != "$before" ]]; then
      idle=0 before=$progress
    fi
    if ((idle >= MAX_IDLE_RESTARTS)); then
      [[ $code -ne 5 ]] || ended 5 "not all hosts could be prepared; what they said is above"
      [[ $refusal == no ]] || ended 3 "Google Cloud refused $NAME after $idle restarts (MAX_IDLE_RESTARTS): gives up"
      ended 6 "no new checkpoint after $idle restarts (MAX_IDLE_RESTARTS), the newest is $progress: gives up"
    fi
    idle=$((idle + 1))
    say "launch: $(stamp)not running: $STATE_TOLD; goes on from the newest checkpoint, as far as known $progress"
    if [[ $refusal == yes ]]; then
      for ((turn = 0; turn < 10 * idle; turn++)); do sleep "$POLL_SECONDS"; done
    fi
  done
}

# follow: until the run has ended or its hosts are lost; keeps watch's progress. Status 0: it is done; 1: it
# failed; 143: it was stopped; 7: it has to be started again; 4: maintenance takes too long.
follow() {
  local told='' silent=0 found
  while :; do
    sleep "$POLL_SECONDS"
    slice_state
    case $STATE in
      READY) ;;
      WAITING) # in maintenance
        wait_while WAITING || return
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
  if [[ $TEARDOWN_WHEN_DONE == yes && $1 =~ ^(0|1|3|4|6)$ ]]; then
    teardown || exit
  elif [[ ! $1 =~ ^(3|4)$ ]]; then
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
  costs || code=3
  if [[ $STATE != ABSENT && $DRY_RUN == no ]]; then
    say "launch: $NAME is NOT gone, and may still cost money: $STATE_TOLD"
    return 3
  fi
  return "$code"
}

# costs: what there is in the zone and may cost money, not only of this run, and through both APIs. Status 3: some
# of it cannot be listed.
costs() {
  local code=0
  say "launch: what there is in $ZONE of $PROJECT; anything listed here may cost money:"
  listed gcloud compute tpus queued-resources list "--project=$PROJECT" "--zone=$ZONE" || code=3
  listed gcloud compute tpus tpu-vm list "--project=$PROJECT" "--zone=$ZONE" || code=3
  listed gcloud compute instance-groups managed list "--project=$PROJECT" "--zones=$ZONE" || code=3
  listed gcloud compute instances list "--project=$PROJECT" "--zones=$ZONE" || code=3
  listed gcloud compute disks list "--project=$PROJECT" "--zones=$ZONE" || code=3
  [[ -z $SHARED_SOURCE ]] || say "launch: not listed, and stays: the storage $SHARED_SOURCE with $RUN_DIR"
  return "$code"
}
