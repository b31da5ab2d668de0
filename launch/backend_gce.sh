# shellcheck shell=bash disable=SC2034
# TPUs through Compute Engine: v5p, v6e, TPU7x. Each slice is a managed instance group of its own; the
# functions are those of backend_tpu_vm.sh.

STATE='' STATE_TOLD=''
COORDINATOR_PORT=8482

in_zone=()
ssh_flags=()
backend_init() {
  in_zone=("--project=$PROJECT" "--zone=$ZONE")
  [[ $INTERNAL_IPS == no ]] || ssh_flags=(--tunnel-through-iap)
}

REGION() { echo "${ZONE%-*}"; }

groups() {
  local slice
  for ((slice = 0; slice < SLICES; slice++)); do echo "$NAME-$slice"; done
}

# kind: what a group's description says, by which one of other settings is told.
kind() { echo "$ACCELERATOR x $SLICES"; }

WAS_READY=no # a host that is missing then is lost, not late
MACHINES=()  # of all slices, in the order of their processes
MADE=()      # the groups that are there
slice_state() {
  local group machine status running listed description absent=0
  STATE=READY STATE_TOLD='' MACHINES=() MADE=()
  ask_patiently gcloud compute instance-groups managed list "--project=$PROJECT" "--zones=$ZONE" \
    "--filter=name~^$NAME-[0-9]+\$" '--format=csv[no-heading](name,description)' || true
  while IFS=, read -r group description; do
    [[ -n $group ]] || continue
    MADE+=("$group")
    if [[ $description != "${description:+$(kind)}" || " $(groups | tr '\n' ' ')" != *" $group "* ]]; then
      STATE=OTHER STATE_TOLD+="$group (${description:-unknown}), "
    fi
  done <<<"$REPLY"
  if [[ $STATE == OTHER ]]; then
    STATE_TOLD=${STATE_TOLD%, }
    return
  fi
  for group in $(groups); do
    if ! ask_patiently gcloud compute instance-groups managed list-instances "$group" "${in_zone[@]}" \
      '--format=value(instance.basename(),instanceStatus)'; then
      absent=$((absent + 1)) STATE_TOLD+="$group absent; "
      continue
    fi
    running=0 listed=0
    while read -r machine status; do
      [[ -n $machine ]] || continue
      MACHINES+=("$machine")
      listed=$((listed + 1))
      case $status in
        RUNNING) running=$((running + 1)) ;;
        STOPPING | STOPPED | TERMINATED | SUSPENDING | SUSPENDED) STATE=LOST ;;
      esac
    done < <(sort -V <<<"$REPLY")
    STATE_TOLD+="$group $running of $HOSTS running; "
    if ((listed > 0 && listed < HOSTS)); then # they come together, and are of no use alone
      STATE=LOST
    fi
    ((running == HOSTS)) || [[ $STATE == LOST ]] || STATE=WAITING
  done
  STATE_TOLD=${STATE_TOLD%; }
  if ((absent == SLICES)); then
    STATE=ABSENT
  elif ((absent > 0)); then
    [[ $STATE == LOST ]] || STATE=WAITING
    [[ $WAS_READY == no ]] || STATE=LOST
  elif [[ $STATE == READY ]]; then
    WAS_READY=yes
  elif [[ $STATE == WAITING && $WAS_READY == yes ]]; then
    STATE=LOST
  fi
}

told_of_failure() { printf '%s' "$STATE_TOLD"; }

# create_slices: each part that is not there.
create_slices() {
  local region group path
  region=$(REGION)
  path=projects/$PROJECT/regions/$region
  local template=(gcloud compute instance-templates create "$NAME" "--project=$PROJECT"
    "--instance-template-region=$region" "--machine-type=$MACHINE_TYPE" --maintenance-policy=TERMINATE
    "--boot-disk-size=$BOOT_DISK_SIZE" --image-project=ubuntu-os-accelerator-images "--image-family=$IMAGE_FAMILY"
    --scopes=https://www.googleapis.com/auth/cloud-platform "--labels=$(labels)")
  case $CAPACITY in
    spot) template+=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
    flex-start)
      template+=(--provisioning-model=FLEX_START "--max-run-duration=$MAX_RUN_DURATION"
        --instance-termination-action=DELETE) ;;
    reserved)
      template+=(--provisioning-model=RESERVATION_BOUND --reservation-affinity=specific "--reservation=$RESERVATION"
        --instance-termination-action=DELETE) ;;
    on-demand) template+=(--provisioning-model=STANDARD) ;;
  esac
  [[ -z $BOOT_DISK_TYPE ]] || template+=("--boot-disk-type=$BOOT_DISK_TYPE")
  [[ -z $SERVICE_ACCOUNT ]] || template+=("--service-account=$SERVICE_ACCOUNT")
  [[ -z $NETWORK ]] || template+=("--network=$NETWORK")
  [[ -z $SUBNETWORK ]] || template+=("--subnet=$SUBNETWORK")
  [[ $INTERNAL_IPS == no ]] || template+=(--no-address)
  # What is left of a run with other settings would be used as it is.
  [[ $STATE != ABSENT ]] || delete_parts || return
  change "$EXISTS" "${template[@]}" || return
  if ((HOSTS > 1)); then
    change "$EXISTS" gcloud compute resource-policies create workload-policy "$NAME" "--project=$PROJECT" \
      "--region=$region" --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY" \
      --accelerator-topology-mode=AUTO_CONNECT || return
  fi
  for group in $(groups); do
    local command=(gcloud compute instance-groups managed create "$group" "${in_zone[@]}" --size=0 "--description=$(kind)"
      "--template=$path/instanceTemplates/$NAME" --target-size-policy-mode=bulk
      --default-action-on-vm-failure=do-nothing)
    ((HOSTS == 1)) || command+=("--workload-policy=$path/resourcePolicies/$NAME")
    change "$EXISTS" "${command[@]}" || return
    change "$EXISTS" gcloud compute instance-groups managed resize "$group" "${in_zone[@]}" "--size=$HOSTS" || return
  done
}

delete_slices() {
  local group code=0
  WAS_READY=no
  [[ $DRY_RUN == no ]] || mapfile -t MADE < <(groups)
  for group in "${MADE[@]}"; do # the machines one by one would be made again
    change "$ABSENT" gcloud compute instance-groups managed delete "$group" "${in_zone[@]}" --quiet || code=$?
  done
  delete_parts || code=$?
  return "$code"
}

# delete_parts: what groups are made from.
delete_parts() {
  local code=0
  change "$ABSENT" gcloud compute instance-templates delete "$NAME" "--project=$PROJECT" "--region=$(REGION)" --quiet || code=$?
  change "$ABSENT" gcloud compute resource-policies delete "$NAME" "--project=$PROJECT" "--region=$(REGION)" --quiet || code=$?
  return "$code"
}

# machines: those of MACHINES; in a dry run, where there are none, names that stand for them.
machines() {
  local index
  if [[ $DRY_RUN == yes ]]; then
    for ((index = 0; index < SLICES * HOSTS; index++)); do echo "$NAME-$((index / HOSTS))-MACHINE$((index % HOSTS))"; done
  else
    printf '%s\n' "${MACHINES[@]}"
  fi
}

# identity INDEX FIRST: the variables of process INDEX, FIRST being the machine of process 0.
identity() {
  printf ' RLHF_JAX_COORDINATOR=%s:%d RLHF_JAX_NUM_PROCESSES=%d RLHF_JAX_PROCESS_ID=%d' \
    "$2" "$COORDINATOR_PORT" $((SLICES * HOSTS)) "$1"
  ((SLICES == 1)) || printf ' MEGASCALE_COORDINATOR_ADDRESS=%s MEGASCALE_NUM_SLICES=%d MEGASCALE_SLICE_ID=%d' \
    "$2" "$SLICES" $(($1 / HOSTS))
}

on_hosts() {
  local machine index=0 code=0 all processes=()
  mapfile -t all < <(machines)
  for machine in "${all[@]}"; do
    local told=${1//@identity@/$(identity "$index" "${all[0]}")}
    if [[ $DRY_RUN == yes ]]; then
      run gcloud compute ssh "$machine" "${in_zone[@]}" "${ssh_flags[@]}" "--command=$told" -- "${SSH_OPTIONS[@]}"
    else
      run gcloud compute ssh "$machine" "${in_zone[@]}" "${ssh_flags[@]}" "--command=$told" -- "${SSH_OPTIONS[@]}" \
        </dev/null >"$SCRATCH/host-$index" &
      processes+=($!)
    fi
    index=$((index + 1))
  done
  for ((index = 0; index < ${#processes[@]}; index++)); do
    wait "${processes[index]}" || code=$?
    cat "$SCRATCH/host-$index"
  done
  return "$code"
}

on_host() {
  local all
  mapfile -t all < <(machines)
  run gcloud compute ssh "${all[$1]}" "${in_zone[@]}" "${ssh_flags[@]}" "--command=$2" -- "${SSH_OPTIONS[@]}" </dev/null
}

copy_to_hosts() {
  local machine processes=() process code=0 flags=("${ssh_flags[@]}" "${SSH_OPTIONS[@]/#-o/--scp-flag=-o}")
  for machine in $(machines); do
    if [[ $DRY_RUN == yes ]]; then
      run gcloud compute scp "$1" "$machine:$2" "${in_zone[@]}" "${flags[@]}"
    else
      run gcloud compute scp "$1" "$machine:$2" "${in_zone[@]}" "${flags[@]}" </dev/null &
      processes+=($!)
    fi
  done
  for process in "${processes[@]}"; do
    wait "$process" || code=$?
  done
  return "$code"
}
