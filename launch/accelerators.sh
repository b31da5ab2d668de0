# shellcheck shell=bash disable=SC2034
# What an accelerator type is: chips, hosts, memory, and its names in the three APIs.

GENERATION='' CHIPS=0 HOSTS=0 HBM=0 GKE_ACCELERATOR=''

# describe_accelerator: reads ACCELERATOR; sets the above, and RUNTIME, MACHINE_TYPE, IMAGE_FAMILY, BOOT_DISK_TYPE and TOPOLOGY
# where the settings leave them open. Adds to PROBLEMS.
describe_accelerator() {
  local number per_host=4 runtime='' machine='' largest
  local image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  if [[ $ACCELERATOR =~ ^tpu7x-([1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*)$ ]]; then
    GENERATION=tpu7x HBM=192 machine=tpu7x-standard-4t GKE_ACCELERATOR=tpu7x image=''
    TOPOLOGY=${TOPOLOGY:-${BASH_REMATCH[1]}}
    CHIPS=$((${BASH_REMATCH[1]//x/*}))
    BOOT_DISK_TYPE=${BOOT_DISK_TYPE:-hyperdisk-balanced}
    ((CHIPS % 4 == 0)) || problem "ACCELERATOR: $ACCELERATOR has $CHIPS chips: a multiple of 4, those of a host"
  elif [[ $ACCELERATOR =~ ^(v4|v5p|v5litepod|v6e)-([1-9][0-9]*)$ ]]; then
    GENERATION=${BASH_REMATCH[1]} number=${BASH_REMATCH[2]}
    case $GENERATION in
      v4)
        CHIPS=$((number / 2)) HBM=32 runtime=tpu-ubuntu2204-base
        machine=ct4p-hightpu-4t GKE_ACCELERATOR=tpu-v4-podslice ;;
      v5p)
        CHIPS=$((number / 2)) HBM=95 runtime=v2-alpha-tpuv5
        machine=ct5p-hightpu-4t GKE_ACCELERATOR=tpu-v5p-slice ;;
      v5litepod)
        CHIPS=$number HBM=16 runtime=v2-alpha-tpuv5-lite
        machine=ct5lp-hightpu-4t GKE_ACCELERATOR=tpu-v5-lite-podslice ;;
      v6e)
        CHIPS=$number HBM=32 runtime=v2-alpha-tpuv6e
        machine=ct6e-standard-4t GKE_ACCELERATOR=tpu-v6e-slice ;;
    esac
    case $GENERATION in
      v4 | v5p) # the number counts TensorCores, two to a chip
        ((number % 8 == 0)) || problem "ACCELERATOR: $ACCELERATOR counts TensorCores, two to a chip: a multiple of 8" ;;
      *)
        [[ $number =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
          problem "ACCELERATOR: $ACCELERATOR counts chips: 1, 4, 8, 16, 32, 64, 128 or 256"
        if ((number <= 8)); then
          per_host=$number machine=${machine%-4t}-${number}t
        fi
        case $number in
          1) largest=1x1 ;; 4) largest=2x2 ;; 8) largest=2x4 ;; 16) largest=4x4 ;; 32) largest=4x8 ;;
          64) largest=8x8 ;; 128) largest=8x16 ;; *) largest=16x16 ;;
        esac
        TOPOLOGY=${TOPOLOGY:-$largest} ;;
    esac
  else
    problem "ACCELERATOR: expected v4-N or v5p-N (N TensorCores, two to a chip), v5litepod-N or v6e-N (N chips), \
or tpu7x-AxBxC (its topology), got '$(shown "$ACCELERATOR")'"
    return 0
  fi
  HOSTS=$((CHIPS / per_host))
  RUNTIME=${RUNTIME:-$runtime}
  MACHINE_TYPE=${MACHINE_TYPE:-$machine}
  IMAGE_FAMILY=${IMAGE_FAMILY:-$image}
  if [[ -n $TOPOLOGY ]] && { [[ ! $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || ((${TOPOLOGY//x/*} != CHIPS)); }; then
    problem "TOPOLOGY: expected sizes whose product is the $CHIPS chips of $ACCELERATOR, such as 4x4x4, got '$TOPOLOGY'"
  fi
}

# check_backend: adds to PROBLEMS what the chosen API does not offer.
check_backend() {
  local name unused='RUNTIME VALID_UNTIL'
  case $BACKEND in
    tpu-vm)
      unused='TOPOLOGY IMAGE_FAMILY MACHINE_TYPE BOOT_DISK_SIZE BOOT_DISK_TYPE MAX_RUN_DURATION'
      [[ $GENERATION != tpu7x ]] || problem "BACKEND: the Cloud TPU API does not offer tpu7x; set BACKEND=gce"
      [[ $CAPACITY != flex-start ]] || problem "CAPACITY: flex-start takes BACKEND=gce" ;;
    gce)
      [[ $GENERATION =~ ^(v5p|v6e|tpu7x|)$ ]] ||
        problem "BACKEND: Compute Engine offers v5p, v6e and tpu7x, not $GENERATION; set BACKEND=tpu-vm"
      [[ -n $TOPOLOGY || -z $GENERATION ]] || problem "TOPOLOGY: needed for $ACCELERATOR with BACKEND=gce, such as 2x2x4"
      [[ -n $IMAGE_FAMILY || -z $GENERATION ]] || problem "IMAGE_FAMILY: needed for $ACCELERATOR; \
gcloud compute images list --project=ubuntu-os-accelerator-images lists them"
      [[ $CAPACITY != flex-start || -n $MAX_RUN_DURATION ]] ||
        problem "MAX_RUN_DURATION: needed with CAPACITY=flex-start, such as 7d"
      [[ $CAPACITY != reserved || -n $RESERVATION ]] || problem "RESERVATION: needed with CAPACITY=reserved and BACKEND=gce" ;;
  esac
  for name in $unused; do
    [[ $GIVEN != *" $name "* ]] || problem "$name: BACKEND=$BACKEND has no use for it; leave it out"
  done
  [[ -z $RESERVATION || $CAPACITY == reserved ]] || problem "RESERVATION: CAPACITY=$CAPACITY has no use for it"
}

# tell_accelerator: what is about to be paid for.
tell_accelerator() {
  local slices=''
  [[ $SLICES -eq 1 ]] || slices="$SLICES slices, each "
  say "launch: $NAME: $slices$ACCELERATOR: $CHIPS chips of $HBM GB on $HOSTS host(s), $CAPACITY, in $ZONE"
}
