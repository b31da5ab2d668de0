# shellcheck shell=bash disable=SC2034
# The settings of a launch with their defaults, and how they are read: NAME=value lines, no code. Sourced here
# and on the hosts. example.env says what each is for.

NAME='' PROJECT='' ZONE=''
ACCELERATOR='' SLICES=1 BACKEND=tpu-vm CAPACITY=spot TOPOLOGY=''
RUNTIME='' IMAGE_FAMILY='' MACHINE_TYPE='' BOOT_DISK_SIZE=200GB BOOT_DISK_TYPE='' RESERVATION='' MAX_RUN_DURATION=''
SERVICE_ACCOUNT='' NETWORK='' SUBNETWORK='' INTERNAL_IPS=no
VALID_UNTIL='' WAIT_SECONDS=21600 POLL_SECONDS=30
CONFIG='' TRAIN_FLAGS='' RUN_DIR=''
SHARED_DIR='' SHARED_SOURCE=''
VENV='' PACKAGES='jax[tpu]'
SECRETS_FILE='' SECRET_MANAGER=''
MAX_IDLE_RESTARTS=3 RESTART_SECONDS=10 STOP_SECONDS=600 TEARDOWN_WHEN_DONE=no
CLUSTER='' IMAGE='' MAX_RESTARTS=50 GKE_SECRET='' GKE_CLAIM=''

SETTINGS=(NAME PROJECT ZONE ACCELERATOR SLICES BACKEND CAPACITY TOPOLOGY RUNTIME IMAGE_FAMILY MACHINE_TYPE
  BOOT_DISK_SIZE BOOT_DISK_TYPE RESERVATION MAX_RUN_DURATION SERVICE_ACCOUNT NETWORK SUBNETWORK INTERNAL_IPS VALID_UNTIL
  WAIT_SECONDS POLL_SECONDS CONFIG TRAIN_FLAGS RUN_DIR SHARED_DIR SHARED_SOURCE VENV PACKAGES SECRETS_FILE
  SECRET_MANAGER MAX_IDLE_RESTARTS RESTART_SECONDS STOP_SECONDS TEARDOWN_WHEN_DONE CLUSTER IMAGE MAX_RESTARTS
  GKE_SECRET GKE_CLAIM)
ENVIRONMENT=() # NAME=value of the lines that begin with ENV_

PROBLEMS=()
problem() { PROBLEMS+=("$1"); }

# read_lines FILE FUNCTION: calls FUNCTION NAME VALUE for each NAME=value line.
read_lines() {
  local line number=0 name value
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    if [[ ! $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]]; then
      problem "$1, line $number: expected NAME=value" # the line is not shown: it may be half a secret
      continue
    fi
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    if [[ $value =~ ^\"([^\"]*)\"[[:space:]]*(#.*)?$ || $value =~ ^\'([^\']*)\'[[:space:]]*(#.*)?$ ]]; then
      value=${BASH_REMATCH[1]}
    else
      value=${value%%[[:space:]]#*}
      value=${value%"${value##*[![:space:]]}"}
    fi
    "$2" "$name" "$value"
  done <"$1"
}

# shown TEXT: the text, unless it looks like a secret.
TOKEN='(^|[^A-Za-z0-9])(hf_|gh[a-z]_|github_pat_)[A-Za-z0-9]{20}'
shown() {
  if [[ $1 =~ $TOKEN ]]; then echo '(a token)'; else echo "$1"; fi
}

SEEN=' '
GIVEN=' ' # of these, what is not empty
set_setting() {
  if [[ $SEEN == *" $1 "* ]]; then
    problem "$1 is given twice"
  fi
  SEEN+="$1 "
  [[ -z $2 ]] || GIVEN+="$1 "
  if [[ $2 =~ $TOKEN ]]; then
    problem "$1: a token belongs in SECRETS_FILE or SECRET_MANAGER, not in the settings"
  fi
  if [[ $1 == ENV_?* ]]; then
    if [[ ${1^^} =~ (TOKEN|SECRET|PASSWORD|KEY)$ ]]; then
      problem "$1: a secret belongs in SECRETS_FILE or SECRET_MANAGER, not in the settings"
    fi
    ENVIRONMENT+=("${1#ENV_}=$2")
  elif [[ " ${SETTINGS[*]} " == *" $1 "* ]]; then
    printf -v "$1" '%s' "$2"
  else
    problem "$1: there is no such setting; those that there are: ${SETTINGS[*]}, and ENV_..."
  fi
}

# check NAME PATTERN TEXT: a problem unless the setting matches.
check() {
  [[ ${!1} =~ ^($2)$ ]] || problem "$1: expected $3, got '$(shown "${!1}")'"
}

# read_settings FILE: sets the variables above. Adds to PROBLEMS.
read_settings() {
  read_lines "$1" set_setting
  check NAME '[a-z][a-z0-9-]{0,38}[a-z0-9]' 'lower-case letters, digits and dashes, at most 40, a letter first'
  check PROJECT '[a-z][a-z0-9.:-]*' "the project's id"
  check ZONE '[a-z]+-[a-z0-9]+-[a-z]' 'a zone, such as us-east5-b'
  check SLICES '[1-9][0-9]*' 'a whole number from 1'
  check BACKEND 'tpu-vm|gce' 'tpu-vm or gce'
  check CAPACITY 'spot|on-demand|reserved|flex-start' 'spot, on-demand, reserved or flex-start'
  check INTERNAL_IPS 'yes|no' 'yes or no'
  check TEARDOWN_WHEN_DONE 'yes|no' 'yes or no'
  check CONFIG '[^/].*' 'a configuration that git tracks, as a path from the root of the repository'
  check RUN_DIR '/.*[^/]' 'an absolute path on storage that all hosts share'
  local name
  for name in WAIT_SECONDS MAX_IDLE_RESTARTS STOP_SECONDS MAX_RESTARTS; do
    check "$name" '0|[1-9][0-9]*' 'a whole number'
  done
  for name in POLL_SECONDS RESTART_SECONDS; do
    check "$name" '(0|[1-9][0-9]*)(\.[0-9]+)?' 'seconds'
  done
  check SHARED_SOURCE '|gs://[^/]+|[^/:]+:/.*' 'gs://BUCKET or SERVER:/SHARE, or nothing'
  if [[ -n $SHARED_SOURCE ]]; then
    check SHARED_DIR '/.*[^/]' 'where SHARED_SOURCE is to be mounted'
    [[ $RUN_DIR/ == "$SHARED_DIR"/* ]] || problem "RUN_DIR: expected a path below SHARED_DIR, got '$RUN_DIR'"
  fi
  check SECRET_MANAGER '([A-Za-z_][A-Za-z0-9_]*:[A-Za-z0-9_-]+ ?)*' 'VARIABLE:SECRET pairs, such as HF_TOKEN:hf-token'
}

# stop_at_problems CODE: tells all of them.
stop_at_problems() {
  [[ ${#PROBLEMS[@]} -eq 0 ]] && return 0
  printf 'launch: %s\n' "${PROBLEMS[@]}" >&2
  exit "$1"
}
