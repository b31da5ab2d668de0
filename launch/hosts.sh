# shellcheck shell=bash
# What is done on all hosts of all slices: ship code, install, start, status, stop. Each step may be repeated.

num_hosts() { echo $((SLICES * HOSTS)); }
job() { echo "rlhf_jax/$NAME"; }

# labels: of what is made; whose it is as well.
labels() {
  local owner
  owner=$(id -un)
  owner=${owner,,}
  echo "run=$NAME,owner=${owner//[^a-z0-9_-]/-}"
}

# A host that is gone without a word does not keep a command waiting for ever.
# shellcheck disable=SC2034 # the backends read it
SSH_OPTIONS=(-oConnectTimeout=20 -oServerAliveInterval=30 -oServerAliveCountMax=4)

# every_host ATTEMPTS COMMAND: runs it on all hosts until each has answered with a line "@host NAME ...", none
# of which says "failed"; the lines are then in REPLY. Status 5: some did not, and they are named, or there are more
# hosts than the settings say.
every_host() {
  local attempts=$1 command=$2 attempt=0 answers failed
  while :; do
    attempt=$((attempt + 1))
    # What counts is which hosts have answered; what ssh says of connections is told only if one has not.
    on_hosts "$command" >"$SCRATCH/answers" 2>"$SCRATCH/said" || true
    if [[ $DRY_RUN == yes ]]; then
      cat "$SCRATCH/answers"
      return 0
    fi
    REPLY=$(grep '^@host ' "$SCRATCH/answers" | sort -u) || true
    answers=$(grep -c . <<<"$REPLY") || true
    failed=$(grep '^@host [^ ]* failed: ' <<<"$REPLY") || true
    [[ $answers -eq $(num_hosts) && -z $failed ]] && return 0
    ((attempt < attempts)) || break
    say "launch: $answers of $(num_hosts) hosts answered${failed:+, and of these failed:
$failed}; once more"
    sleep "$POLL_SECONDS"
  done
  tail -n 100 "$SCRATCH/said" >&2
  [[ -z $failed ]] || say "$failed"
  ((answers >= $(num_hosts))) || name_unreachable
  return 5
}

name_unreachable() {
  local host
  for ((host = 0; host < $(num_hosts); host++)); do
    on_host "$host" true >/dev/null || say "launch: host $((host % HOSTS)) of slice $((host / HOSTS)) cannot be reached by ssh"
  done
}

# archive_code: sets TREE and ARCHIVE, a tar of the files that git tracks, as they are now.
TREE='' ARCHIVE=''
archive_code() {
  local commit
  git -C "$ROOT" rev-parse --verify --quiet HEAD >/dev/null || die 2 "$ROOT is not a git repository with a commit"
  git -C "$ROOT" update-index -q --refresh >/dev/null || true # or a file that was only touched is taken for changed
  commit=$(git -C "$ROOT" stash create) || die 2 "git cannot snapshot the tree: finish the merge, or git add"
  [[ -z $commit ]] || say "launch: tracked files that are not committed are shipped as they are"
  TREE=$(git -C "$ROOT" rev-parse "${commit:-HEAD}^{tree}")
  git -C "$ROOT" cat-file -e "$TREE:$CONFIG" 2>/dev/null || die 2 "CONFIG: git does not track $CONFIG; git add it"
  ARCHIVE=$SCRATCH/code-$TREE.tar.gz
  if [[ $DRY_RUN == yes ]]; then
    told git -C "$ROOT" archive --format=tar.gz "--output=$ARCHIVE" "$TREE"
  else
    git -C "$ROOT" archive --format=tar.gz "--output=$ARCHIVE" "$TREE"
  fi
}

checksum() {
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d' ' -f1
}

ship() {
  local sums=SHA256 job old=''
  job=$(job)
  if [[ $DRY_RUN == no ]]; then
    sums=$(checksum "$ARCHIVE")
  fi
  say "launch: $(stamp)ships code $TREE"
  [[ -n $SECRETS_FILE ]] || old=" && rm -f $job/secrets.env" # of settings that had one
  every_host 3 "mkdir -p -m 700 $job$old && echo \"@host \$(hostname) ready\"" || return
  copied "$ARCHIVE" "$job/code.tar.gz" || return
  copied "$SETTINGS_FILE" "$job/settings.env" || return
  if [[ -n $SECRETS_FILE ]]; then
    copied "$SECRETS_FILE" "$job/secrets.env" || return
  fi
  every_host 3 "cd $job && if echo '$sums  code.tar.gz' | sha256sum --quiet --check && \
{ test -e code-$TREE || { rm -rf new && mkdir new && tar -xzf code.tar.gz -C new && mv new code-$TREE; }; }; then \
echo \"@host \$(hostname) code $TREE verified\"; else echo \"@host \$(hostname) failed: code.tar.gz has another checksum\"; fi"
}

copied() {
  local attempt
  for attempt in 1 2 3; do
    copy_to_hosts "$1" "$2" && return 0
    say "launch: attempt $attempt to copy $(basename "$2") failed"
    sleep "$POLL_SECONDS"
  done
  name_unreachable
  return 5
}

# remote VERB: the command line of on_host.sh in the code that was shipped.
remote() {
  local code
  code=$(job)/code-$TREE
  echo "if test -e $code; then bash $code/launch/on_host.sh $*; \
else echo \"@host \$(hostname) failed: code $TREE is not there: ship it\"; fi"
}

# running VERB: the same in the code that runs, or ran last.
running() {
  echo "if test -e $(job)/code; then bash \"\$(cat $(job)/code)\"/launch/on_host.sh $*; \
else echo \"@host \$(hostname) idle progress=unknown\"; fi"
}

install() {
  say "launch: $(stamp)installs"
  every_host 3 "$(remote install)"
}
start() {
  say "launch: $(stamp)starts"
  every_host 3 "$(remote start@identity@)"
}
status() { every_host "${1:-3}" "$(running status)"; }
stop() { every_host 3 "$(running stop)"; }

# logs HOST ARGUMENTS...: of tail.
logs() {
  local quoted
  printf -v quoted ' %q' "${@:2}"
  on_host "$1" "tail$quoted $(job)/log"
}
