#!/usr/bin/env bash
# What runs on each host of a TPU slice: install, start, status, stop; tpu.sh calls it by ssh.
#
# It lies in JOB/code-TREE/launch; JOB (~/rlhf_jax/NAME) holds the settings as well, and what a run leaves: its
# log, state, pid, and a lock that is held as long as its supervisor or its trainer lives. Lines that begin with
# "@host" are read by tpu.sh, one from each host.
set -euo pipefail

CODE=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
JOB=${CODE%/*}
# shellcheck source=launch/settings.sh
source "$CODE/launch/settings.sh"
HOST=$(hostname)

tell() { printf '@host %s %s\n' "$HOST" "$*"; }
note() { printf '%s launch: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"; }

fail() {
  tell "failed: $*"
  exit 1
}

# shared: RUN_DIR's storage is mounted when this returns.
shared() {
  [[ -n $SHARED_SOURCE ]] || return 0
  mountpoint -q "$SHARED_DIR" && return 0
  sudo mkdir -p "$SHARED_DIR" && sudo chown "$(id -u):$(id -g)" "$SHARED_DIR"
  case $SHARED_SOURCE in
    gs://*)
      command -v gcsfuse >/dev/null ||
        fail "gcsfuse is not on this image: install it (cloud.google.com/storage/docs/cloud-storage-fuse/install), or share by NFS"
      # Checkpoints are renamed as directories.
      gcsfuse --implicit-dirs --rename-dir-limit=1000000 "${SHARED_SOURCE#gs://}" "$SHARED_DIR" >&2 ||
        fail "$SHARED_SOURCE cannot be mounted" ;;
    *)
      command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common >&2
      sudo mount -t nfs "$SHARED_SOURCE" "$SHARED_DIR" || fail "$SHARED_SOURCE cannot be mounted" ;;
  esac
}

# environment: prints the directory of the Python environment; its name changes with what it holds.
environment() {
  if [[ -n $VENV ]]; then
    echo "$VENV"
  else
    echo "$HOME/rlhf_jax/venv-$({ cat "$CODE/requirements.txt" "$CODE/.python-version"; echo "$PACKAGES"; } | sha256sum | cut -c1-12)"
  fi
}

install() {
  shared
  local venv packages
  venv=$(environment)
  if [[ -z $VENV && ! -e $venv/.complete ]]; then
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv >&2 ||
      fail "uv cannot be installed: is there a way to PyPI (an external address, or Cloud NAT)?"
    read -ra packages <<<"$PACKAGES"
    uv venv --quiet --clear --python "$(<"$CODE/.python-version")" "$venv" >&2 || fail "uv makes no environment"
    uv pip install --quiet --python "$venv/bin/python" -r "$CODE/requirements.txt" "${packages[@]}" >&2 ||
      fail "the packages cannot be installed"
    touch "$venv/.complete"
  fi
  local versions
  versions=$("$venv/bin/python" -c '
import importlib.metadata, platform
found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
print("Python", platform.python_version(), *(f"{name} {found.get(name)}" for name in ("jax", "flax", "libtpu")))') ||
    fail "no Python in $venv"
  mkdir -p "$RUN_DIR" || fail "RUN_DIR: $RUN_DIR cannot be made"
  tell "installed $versions"
}

# progress: prints the newest checkpoint of each stage, and whether it is done, as one word.
progress() {
  local stage step newest word=''
  for stage in "$RUN_DIR"/*/; do
    [[ -d $stage/checkpoints ]] || continue
    newest=''
    for step in "$stage"/checkpoints/*/manifest.json; do
      [[ -e $step ]] || continue
      step=$(basename "${step%/manifest.json}")
      [[ $step =~ ^[0-9]+$ ]] && ((step > ${newest:--1})) && newest=$step
    done
    word+=$(basename "$stage"):${newest:-none}
    [[ ! -e $stage/result.json ]] || word+=:done
    word+=,
  done
  echo "${word:-none}"
}

# settings_sum: of the settings that a supervisor and its trainer have read.
settings_sum() {
  printf '%s\n' "$PROJECT" "$CONFIG" "$TRAIN_FLAGS" "$RUN_DIR" "$SHARED_DIR" "$SHARED_SOURCE" "$VENV" "$PACKAGES" \
    "$SECRETS_FILE" "$SECRET_MANAGER" "$MAX_IDLE_RESTARTS" "$RESTART_SECONDS" "${ENVIRONMENT[@]}" | sha256sum
}

state() { printf '%s\n' "$*" >"$JOB/state.new" && mv "$JOB/state.new" "$JOB/state"; }

# is_running: the lock is held.
is_running() { ! flock -n "$JOB/lock" true; }

status() {
  local word=idle
  [[ ! -e $JOB/state ]] || word=$(<"$JOB/state")
  if [[ $word == running* ]] && ! is_running; then
    word="idle ${word#running }"
  fi
  tell "$word progress=$(progress)"
}

start() {
  shared # a reboot unmounts it
  if is_running; then
    [[ $(cat "$JOB/code" 2>/dev/null) == "$CODE" ]] || fail "another version of the code is running; stop it first"
    [[ $(cat "$JOB/started_with" 2>/dev/null) == "$(settings_sum)" ]] || fail "other settings are running; stop first"
    tell "started before"
    return
  fi
  rm -f "$JOB/stop" "$JOB/pid"
  state "running restarts=0"
  echo "$CODE" >"$JOB/code"
  settings_sum >"$JOB/started_with"
  # A session of its own: the supervisor outlives ssh.
  setsid bash "$CODE/launch/on_host.sh" supervise "$@" </dev/null >>"$JOB/log" 2>&1 &
  local attempt
  for ((attempt = 0; attempt < 100; attempt++)); do
    if is_running || [[ $(<"$JOB/state") != running* ]]; then
      tell "started"
      return
    fi
    sleep 0.1
  done
  fail "the supervisor does not start; $JOB/log says why"
}

add_variable() { ENVIRONMENT+=("$1=$2"); }

# train VARIABLE=VALUE...: becomes the trainer.
train() {
  local flags
  ENVIRONMENT+=("$@")
  [[ ! -e $JOB/secrets.env ]] || read_lines "$JOB/secrets.env" add_variable
  stop_at_problems 2
  add_secrets
  read -ra flags <<<"$TRAIN_FLAGS"
  cd "$CODE"
  # The variables come last, as they may bear the names of those here.
  set -- "$(environment)/bin/python" -m rlhf_jax.train --config "$CONFIG" --run.dir "$RUN_DIR" "${flags[@]}"
  unset flags
  become "${#ENVIRONMENT[@]}" "${ENVIRONMENT[@]}" "$@"
}

# become N VARIABLE=VALUE... COMMAND...: runs the command with N variables.
become() {
  while (($1 > 0)); do
    export "${2?}"
    set -- $(($1 - 1)) "${@:3}"
  done
  exec "${@:2}" </dev/null
}

# add_secrets: to ENVIRONMENT, those of the Secret Manager.
add_secrets() {
  local pair value
  for pair in $SECRET_MANAGER; do
    value=$(gcloud secrets versions access latest "--secret=${pair#*:}" "--project=$PROJECT") || {
      note "the secret ${pair#*:} cannot be read: may the hosts' service account (roles/secretmanager.secretAccessor)?"
      exit 1 # it may be there again in a moment
    }
    add_variable "${pair%%:*}" "$value"
  done
}

# keep_log: the log is copied beside the run every minute, as the host's disk goes with it.
keep_log() {
  local copy=$RUN_DIR.logs/$HOST-$1.log
  mkdir -p "$RUN_DIR.logs" && cp "$JOB/log" "$copy.new" && mv "$copy.new" "$copy"
}

# supervise VARIABLE=VALUE...: trains, again after a failure that another attempt may get past.
supervise() {
  exec 9>>"$JOB/lock"
  flock -w 10 9 || return 0 # whoever only looks holds it for a moment
  local code pid before now idle=0 restarts=0 ending=no since copier
  since=$(date -u +%Y%m%dT%H%M%S)
  trap 'ending=yes' TERM # the machine is about to stop: the trainer hears of it too, and saves
  (
    while sleep 60; do keep_log "$since" || true; done
  ) 9>&- 2>/dev/null & # or bash tells how the sleep ends
  copier=$!
  before=$(progress)
  while :; do
    state "running restarts=$restarts"
    note "starts training, progress $(progress)"
    train "$@" &
    pid=$!
    echo "$pid" >"$JOB/pid"
    [[ ! -e $JOB/stop ]] || kill -TERM "$pid" # which came while there was no pid
    wait "$pid" && code=0 || code=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal to this process ends `wait` alone
      wait "$pid" && code=0 || code=$?
    done
    rm -f "$JOB/pid"
    now=$(progress)
    note "training ended with exit code $code, progress $now"
    if [[ $code -eq 0 ]]; then
      state "done restarts=$restarts"
      break
    elif [[ -e $JOB/stop ]]; then
      state "stopped code=$code restarts=$restarts"
      break
    elif [[ $ending == yes ]]; then
      break # its state stays "running" without a supervisor, which is "idle"
    elif [[ $code -eq 2 ]]; then
      note "the configuration, the data or a checkpoint is wrong: another attempt would end alike"
      state "failed code=$code restarts=$restarts"
      break
    fi
    if [[ $now != "$before" ]]; then
      idle=0 before=$now
    fi
    if ((idle >= MAX_IDLE_RESTARTS)); then
      note "no new checkpoint after $idle restarts (MAX_IDLE_RESTARTS): gives up"
      state "failed code=$code restarts=$restarts"
      break
    fi
    idle=$((idle + 1)) restarts=$((restarts + 1))
    sleep "$RESTART_SECONDS"
    if [[ -e $JOB/stop ]]; then
      state "stopped code=$code restarts=$restarts"
      break
    fi
  done
  pkill_children "$copier"
  wait "$copier" 2>/dev/null || true # or bash tells of its end
  keep_log "$since" || note "the log cannot be copied to $RUN_DIR.logs"
}

# pkill_children PID: ends the process that copies the log, and the sleep in it.
pkill_children() {
  pkill -P "$1" 2>/dev/null || true
  kill "$1" 2>/dev/null || true
}

# stop: asks the trainer to save and end, once: a second signal would end it without. Returns when it has.
stop() {
  if [[ ! -e $JOB/stop ]] && is_running; then
    touch "$JOB/stop"
    [[ ! -s $JOB/pid ]] || kill -TERM "$(<"$JOB/pid")" 2>/dev/null || true
  fi
  flock -w "$STOP_SECONDS" "$JOB/lock" true || fail "still saving after $STOP_SECONDS s (STOP_SECONDS)"
  status
}

[[ $# -gt 0 ]] || fail "expected install, start, status or stop"
read_settings "$JOB/settings.env"
case $1 in
  status | stop | supervise) ;; # what runs may be older than the settings, and has to be told of and stopped
  *) stop_at_problems 1 ;;
esac
verb=$1
shift
case $verb in
  install | start | supervise | status | stop) "$verb" "$@" ;;
  *) fail "unknown: $verb" ;;
esac
