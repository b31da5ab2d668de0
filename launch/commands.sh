# shellcheck shell=bash disable=SC2034
# How commands are run and told; sourced by the others.

DRY_RUN=no

say() { printf '%s\n' "$*" >&2; }

# stamp: the time and a blank; nothing in a dry run, whose output does not change with it.
stamp() { [[ $DRY_RUN == yes ]] || date '+%H:%M:%S '; }

# die CODE TEXT...
die() {
  local code=$1
  shift
  say "launch: $*"
  exit "$code"
}

# told COMMAND...: prints the command as one could type it.
told() {
  local word text=+ quote="'"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      text+=" $word"
    else
      text+=" '${word//$quote/$quote\\$quote$quote}'"
    fi
  done
  printf '%s\n' "$text"
}

# run COMMAND...: runs it; in a dry run it is only told.
run() {
  if [[ $DRY_RUN == yes ]]; then
    told "$@"
    return 0
  fi
  "$@"
}

# ask COMMAND...: a command that changes nothing. Its output is in REPLY, what it says of errors in ERROR.
# In a dry run it is told, and nothing is found.
REPLY='' ERROR=''
ask() {
  REPLY='' ERROR=''
  if [[ $DRY_RUN == yes ]]; then
    told "$@"
    ERROR='NOT_FOUND (dry run)'
    return 1
  fi
  local code=0
  REPLY=$("$@" 2>"$SCRATCH/error") || code=$?
  ERROR=$(<"$SCRATCH/error")
  return "$code"
}

# ask_patiently COMMAND...: the same, again where no answer came, PATIENCE times; exits where none ever does.
# That there is no such thing is an answer: status 1.
PATIENCE=5
ABSENT='NOT_FOUND|[Nn]ot[ -]found'
EXISTS='ALREADY_EXISTS|[Aa]lready exists'
DENIED="PERMISSION_DENIED|UNAUTHENTICATED|auth login|Required '[^']*' permission|has not been used|SERVICE_DISABLED"
ask_patiently() {
  local attempt
  for ((attempt = 1; attempt <= PATIENCE; attempt++)); do
    ask "$@" && return 0
    [[ $ERROR =~ $ABSENT ]] && return 1
    [[ $ERROR =~ $DENIED ]] && break
    say "launch: $(stamp)no answer from Google Cloud: $ERROR"
    sleep "$POLL_SECONDS"
  done
  refused "$ERROR" || exit
}

# change FINE COMMAND...: tells and runs a command that makes or deletes something. An error that matches FINE is
# none: it is so already; what may pass is tried again. Status 3: it was refused, and it is told why.
change() {
  local fine=$1 code attempt error
  shift
  if [[ $DRY_RUN == yes ]]; then
    told "$@"
    return 0
  fi
  for ((attempt = 1; attempt <= PATIENCE; attempt++)); do
    told "$@" >&2
    code=0
    "$@" >&2 2>"$SCRATCH/error" || code=$?
    error=$(<"$SCRATCH/error")
    [[ $code -eq 0 ]] && return 0
    if [[ $error =~ $fine ]]; then
      say "launch: that is so already"
      return 0
    fi
    [[ $error =~ UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|[Tt]imed\ out|[Cc]onnection ]] || break
    say "launch: $error; once more"
    sleep "$POLL_SECONDS"
  done
  refused "$error"
}

# listed COMMAND...: shows a list. Status 3: it cannot be told what there is. Where an API is off there is nothing.
listed() {
  if [[ $DRY_RUN == yes ]]; then
    told "$@"
    return 0
  fi
  if "$@" </dev/null 2>"$SCRATCH/error"; then
    cat "$SCRATCH/error" >&2
  elif ! grep -q -E 'has not been used|SERVICE_DISABLED' "$SCRATCH/error"; then
    say "launch: CANNOT BE LISTED, and may cost money: ${*:2:4}: $(<"$SCRATCH/error")"
    return 3
  fi
}

# refused TEXT: tells what Google Cloud said, and what to do about it; status 3.
refused() {
  local hint=''
  case $1 in
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      hint="The project's quota for $ACCELERATOR ($CAPACITY) in $ZONE does not allow it: ask for more in the console \
(IAM & Admin, Quotas), choose another zone, or a smaller slice." ;;
    *PERMISSION_DENIED* | *UNAUTHENTICATED* | *"auth login"* | *"Required '"*"' permission"* | *"has not been used"* | *SERVICE_DISABLED*)
      hint="Look at \`gcloud auth list\`, whether the account may use TPUs in project $PROJECT (roles/tpu.admin), \
and whether the API is on: gcloud services enable tpu.googleapis.com compute.googleapis.com --project=$PROJECT" ;;
    *[Rr]eservation*) hint="CAPACITY=$CAPACITY: look whether the reservation covers $ACCELERATOR in $ZONE." ;;
  esac
  say "launch: Google Cloud refused: $1${hint:+
$hint}"
  return 3
}
