# shellcheck shell=bash disable=SC2034
# TPU VMs through queued resources: v4, v5e, v5p, v6e. A backend has these functions:
#   slice_state      sets STATE (ABSENT WAITING READY LOST FAILED DELETING OTHER) and STATE_TOLD; OTHER: they are
#                    there, and are not what the settings say
#   create_slices, delete_slices
#   on_hosts COMMAND   runs it on all hosts; @identity@ in it becomes what a process is to be told of itself
#   on_host N COMMAND  runs it on host N, counted over all slices
#   copy_to_hosts FILE DESTINATION

STATE='' STATE_TOLD=''

in_zone=()
ssh_flags=()
backend_init() {
  in_zone=("--project=$PROJECT" "--zone=$ZONE")
  [[ $INTERNAL_IPS == no ]] || ssh_flags=(--tunnel-through-iap)
}

nodes() {
  local slice
  if [[ $SLICES -eq 1 ]]; then
    echo "$NAME"
  else
    for ((slice = 0; slice < SLICES; slice++)); do echo "$NAME-$slice"; done
  fi
}

WAS_READY=no # nodes that are missing then are lost
slice_state() {
  local node state type slices gone=0 other=no
  if ! ask_patiently gcloud compute tpus queued-resources describe "$NAME" "${in_zone[@]}" '--format=value(state.state)'; then
    STATE=ABSENT STATE_TOLD='there is no queued resource'
    return
  fi
  STATE_TOLD="queued resource $REPLY"
  case $REPLY in
    ACTIVE) STATE=READY ;;
    FAILED) STATE=FAILED ;;
    SUSPENDING | SUSPENDED) STATE=LOST ;;
    DELETING) STATE=DELETING ;;
    *) STATE=WAITING ;;
  esac
  [[ $STATE == READY ]] || return 0
  for node in $(nodes); do
    if ask_patiently gcloud compute tpus tpu-vm describe "$node" "${in_zone[@]}" \
      '--format=csv[no-heading](state,acceleratorType,labels.slices)'; then
      IFS=, read -r state type slices <<<"$REPLY"
    else
      state='GONE' type='' slices='' gone=$((gone + 1))
    fi
    STATE_TOLD+=", $node $state"
    if [[ ${type##*/} != "${type:+$ACCELERATOR}" || $slices != "${slices:+$SLICES}" ]]; then
      STATE_TOLD+=" ($type, ${slices:-1} slices)"
      other=yes
    fi
    case $state in
      READY) ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) [[ $STATE == LOST ]] || STATE=WAITING ;;
      *) STATE=LOST ;;
    esac
  done
  # With another number of slices its nodes have other names. What runs on them is not to be deleted as lost.
  if [[ $other == yes || ($gone -eq $SLICES && $WAS_READY == no) ]]; then
    STATE=OTHER
  fi
  [[ $STATE != READY ]] || WAS_READY=yes
}

# told_of_failure: what Google Cloud says of a queued resource that failed.
told_of_failure() {
  ask gcloud compute tpus queued-resources describe "$NAME" "${in_zone[@]}" '--format=yaml(state)' || true
  printf '%s' "$REPLY"
}

create_slices() {
  local command=(gcloud compute tpus queued-resources create "$NAME" "${in_zone[@]}"
    "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "--labels=$(labels),slices=$SLICES")
  if [[ $SLICES -eq 1 ]]; then
    command+=("--node-id=$NAME")
  else
    command+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  case $CAPACITY in
    spot) command+=(--spot) ;;
    reserved) command+=(--reserved) ;;
  esac
  [[ -z $RESERVATION ]] || command+=("--reservation-host-project=$RESERVATION")
  [[ -z $SERVICE_ACCOUNT ]] || command+=("--service-account=$SERVICE_ACCOUNT")
  command+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  [[ -z $NETWORK ]] || command+=("--network=$NETWORK")
  [[ -z $SUBNETWORK ]] || command+=("--subnetwork=$SUBNETWORK")
  [[ $INTERNAL_IPS == no ]] || command+=(--internal-ips)
  [[ -z $VALID_UNTIL ]] || command+=("--valid-until-duration=$VALID_UNTIL")
  change "$EXISTS" "${command[@]}" --async
}

delete_slices() {
  WAS_READY=no
  change "$ABSENT" gcloud compute tpus queued-resources delete "$NAME" "${in_zone[@]}" --force --quiet
}

on_hosts() {
  run gcloud compute tpus queued-resources ssh "$NAME" "${in_zone[@]}" --node=all --worker=all "${ssh_flags[@]}" \
    "--command=${1//@identity@/}" -- "${SSH_OPTIONS[@]}" </dev/null
}

on_host() {
  run gcloud compute tpus queued-resources ssh "$NAME" "${in_zone[@]}" "--node=$(($1 / HOSTS))" \
    "--worker=$(($1 % HOSTS))" "${ssh_flags[@]}" "--command=$2" -- "${SSH_OPTIONS[@]}" </dev/null
}

copy_to_hosts() {
  run gcloud compute tpus queued-resources scp "$1" "$NAME:$2" "${in_zone[@]}" --node=all --worker=all \
    "${ssh_flags[@]}" "${SSH_OPTIONS[@]/#-o/--scp-flag=-o}" </dev/null
}
