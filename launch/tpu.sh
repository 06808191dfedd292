#!/usr/bin/env bash
# Train on a Cloud TPU VM or a pod slice: bash launch/tpu.sh COMMAND [OPTIONS] [-- TRAIN ARGUMENTS]
#   create    book the TPU: tries the zones in turn until one has room
#   setup     on all workers: copy this project and the secrets, install
#   start     on all workers: `tpu-tune train TRAIN ARGUMENTS` in tmux; the same arguments resume a run
#   logs      the end of a worker's log (--follow to stay)
#   status    the TPU's state and each worker's job
#   stop      save after the step that is running, and end the run (--now: end at once); the TPU stays booked
#   delete    give the TPU back, which ends the bill
#   babysit   create, setup and start as needed; re-create a preempted TPU and go on from the bucket; ends with the run,
#             and then says that the TPU is still booked, or with --delete gives it back
# Options, and the environment variable that says the same:
#   --name NAME        TPU_NAME          the TPU's name (default tpu-tune)
#   --zones A,B,...    ZONES             where to look for it, in this order
#   --type TYPE        ACCELERATOR_TYPE  by Google's names or `tpu-tune plan --device`'s: v2-8, v3-8, v4-8, v4-32, v5p-8,
#                                        v5litepod-8 (v5e-8 is the same), v6e-8, ... (default v3-8)
#   --version V        RUNTIME_VERSION   the VM's image (default: Google's for the type)
#   --project ID       PROJECT_ID        (default: gcloud's own setting)
#   --bucket NAME      BUCKET            runs are kept in gs://NAME/TPU_NAME unless --config.output_dir says otherwise
#   --spot             SPOT=1            cheaper, may be preempted; without it on demand
#   --queued           QUEUED=1          by a queued resource, which waits in line
#   --flag=FLAG                          one more flag for gcloud's create; may be repeated
#   --rounds N         ROUNDS            times round the zones before giving up; 0 never does (default 60; babysit 0)
#   --secrets FILE     SECRETS           NAME=VALUE lines for the trainer; WANDB_API_KEY and HF_TOKEN are taken from
#                                        the environment too. They travel in a file that only its owner can read.
#   --worker N         WORKER            for logs: which worker (default 0)
#   --lines N                            for logs: how many (default 100)
#   --follow, --now                      see logs and stop
#   --delete                             for babysit: give the TPU back when the run has ended
#   --dry-run                            print the gcloud commands instead of running them
# Seconds between tries, in the environment: ROUND_SECONDS (60), POLL_SECONDS (30), RETRY_SECONDS (5). For babysit,
# MAX_RESTARTS (3): failures in a row after which it gives up. For --queued, QUEUE_POLLS (60, 0 for ever): polls of one
# zone's queue before the next zone's turn.
# Examples:
#   export PROJECT_ID=my-trc-project ZONES=us-central2-b TPU_NAME=llama
#   bash launch/tpu.sh create --type v4-8 && bash launch/tpu.sh setup
#   bash launch/tpu.sh start --bucket my-bucket -- --config configs/qlora.py --config.data.train=gs://my-bucket/chats.jsonl
#   bash launch/tpu.sh babysit --type v3-8 --spot --zones europe-west4-a,us-central1-a --bucket my-bucket -- \
#     --config configs/qlora.py --config.model.path=mistralai/Mistral-7B-v0.1 --config.data.train=gs://my-bucket/chats.jsonl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/tpu_paths.sh"

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

case "${1:-}" in
  create | setup | start | logs | status | stop | delete | babysit) command=$1 && shift ;;
  -h | --help) usage && exit 0 ;;
  "") usage >&2 && die "give a command" ;;
  *) die "tpu.sh knows create, setup, start, logs, status, stop, delete and babysit, not '$1'; see --help" ;;
esac

name=${TPU_NAME:-tpu-tune} zones=${ZONES:-${ZONE:-}} type=${ACCELERATOR_TYPE:-v3-8} version=${RUNTIME_VERSION:-}
project_id=${PROJECT_ID:-} bucket=${BUCKET:-} spot=${SPOT:-} queued=${QUEUED:-} rounds=${ROUNDS:-} worker=${WORKER:-0}
secrets=${SECRETS:-} lines=100 follow="" now="" delete="" dry="" flags=() train=()
while [ $# -gt 0 ]; do
  option=${1%%=*}
  case "$1" in
    --) shift && train=("$@") && break ;;
    --name | --zones | --zone | --type | --version | --project | --bucket | --rounds | --secrets | --worker | --lines | --flag)
      [ $# -gt 1 ] || die "$1 needs a value"
      value=$2 && shift 2
      ;;
    --*=*) value=${1#*=} && shift ;;
    *) value="" && shift ;;
  esac
  case "$option" in
    --name) name=$value ;;
    --zones | --zone) zones=$value ;;
    --type) type=$value ;;
    --version) version=$value ;;
    --project) project_id=$value ;;
    --bucket) bucket=$value ;;
    --rounds) rounds=$value ;;
    --secrets) secrets=$value ;;
    --worker) worker=$value ;;
    --lines) lines=$value ;;
    --flag) flags+=("$value") ;;
    --spot) spot=1 ;;
    --on-demand) spot="" ;;
    --queued) queued=1 ;;
    --follow) follow=1 ;;
    --now) now=--now ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    --config*) die "$option belongs to the trainer: write it after --" ;;
    *) die "unknown option '$option'; see --help" ;;
  esac
done

[[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || die "TPU name '$name': small letters, digits and - only, a letter first"
[ -n "$zones" ] || die "no zone: give --zones A,B or set ZONES (a TRC grant's mail names them)"
[[ "$zones" =~ ^[a-z0-9-]+(,[a-z0-9-]+)*$ ]] || die "zones '$zones': write them as europe-west4-a,us-central1-a"
[[ "${rounds:-0}$lines${worker/#all/0}" =~ ^[0-9]+$ ]] || die "--rounds, --lines and --worker are whole numbers"
bucket=${bucket#gs://} && bucket=${bucket%/}
IFS=, read -r -a zone_list <<<"$zones"
case "$type" in
  v5e-*) type=v5litepod-${type#v5e-} ;;
  tpu7x* | v7x-*) die "Google books $type by GKE (Google Kubernetes Engine) only, not as a TPU VM: make a node pool there, and \
run tpu-tune train in its containers" ;;
esac
if [ -z "$version" ]; then # cloud.google.com/tpu/docs/runtimes
  case "$type" in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) die "no default image is known for the type '$type': give --version" ;;
  esac
fi
command -v gcloud >/dev/null || [ -n "$dry" ] || die "there is no gcloud here: install Google's Cloud SDK, and log in (gcloud auth login)"

aside=$(mktemp -d) booked=""
trap 'rm -rf "$aside"; still_booked' EXIT
exec 3>&1 # where --dry-run prints, whatever else becomes of a command's output
zone=${zone_list[0]} state=""

# still_booked: says which TPU this command leaves behind, and what ends its bill.
still_booked() {
  case "$command" in setup | logs | status) return 0 ;; esac
  [ -n "$booked" ] && [ -z "$dry" ] || return 0
  say "the TPU $name in $booked is still booked, and is billed unless a grant covers it, until: bash launch/tpu.sh delete \
--name $name --zones $booked${project_id:+ --project $project_id}"
}

# google WORDS...: gcloud compute tpus WORDS in the zone and project at hand, what it says on stderr in $aside/said.
google() {
  local words=(gcloud compute tpus "$@" --zone="$zone" --quiet)
  [ -z "$project_id" ] || words+=(--project="$project_id")
  if [ -n "$dry" ]; then
    printf '+ %s\n' "$(printf '%q ' "${words[@]}")" >&3
    return 0
  fi
  "${words[@]}" </dev/null 2>"$aside/said"
}

# reason: the line of gcloud's complaint that says most.
reason() {
  local line
  line=$(grep -m 1 -E 'ERROR' "$aside/said" || tail -n 1 "$aside/said" || true)
  printf '%s\n' "${line:-gcloud failed and gave no reason}"
}

pause() { sleep "${POLL_SECONDS:-30}"; }

# look: sets $state to the TPU's state in $zone: absent, unknown (gcloud has failed for another reason), or Google's word.
look() {
  local try
  state=unknown
  for try in 1 2 3; do
    if state=$(google tpu-vm describe "$name" --format='value(state)'); then
      [ -n "$state" ] || state=unknown
      return 0
    fi
    state=unknown
    if grep -q -i -E 'not[ _]?found|does not exist' "$aside/said"; then
      state=absent
      return 0
    fi
    [ "$try" = 3 ] || sleep "${RETRY_SECONDS:-5}"
  done
  warn "$zone: $(reason)"
}

# locate: sets $zone and $state to where the TPU is; the first zone and absent (or unknown) where there is none.
locate() {
  local unknown=""
  for zone in "${zone_list[@]}"; do
    if [ -n "$dry" ]; then # nothing is asked: a babysitter shows how it begins, everything else finds its TPU
      state=$([ "$command" = babysit ] && echo absent || echo READY)
      return 0
    fi
    look
    case "$state" in
      absent) ;;
      unknown) unknown=1 ;;
      PREEMPTED | TERMINATED | STOPPED) return 0 ;; # not billed
      *)
        booked=$zone
        return 0
        ;;
    esac
  done
  booked="" zone=${zone_list[0]} state=${unknown:+unknown}
  state=${state:-absent}
}

need_ready() {
  locate
  [ "$state" = READY ] || die "the TPU $name is $state in ${zones//,/, }: create it first, or see status"
}

# ordinary: books a TPU VM in $zone. Statuses: 0 done, 1 no room now, 2 this zone will never do.
ordinary() {
  google tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot} ${flags[@]+"${flags[@]}"} >&2 ||
    refusal
}

# refusal: sorts gcloud's refusal to create.
refusal() {
  case "$(tr '[:upper:]' '[:lower:]' <"$aside/said")" in
    *already*exists*) return 0 ;;
    *"no more capacity"* | *"insufficient"*capacity* | *"not enough resources"* | *"does not have enough resources"* | *stockout* | *"error code 8"* | *'"code": 8'*)
      warn "$zone has no room for a $type now"
      return 1
      ;;
    *quota* | *permission* | *"not available in"* | *"invalid accelerator"* | *"not found"* | *"user does not have access"*)
      warn "$zone is left out: $(reason)"
      return 2
      ;;
    *unavailable* | *internal* | *deadline* | *timeout* | *"timed out"* | *"connection"* | *resource_exhausted* | *"rate limit"* | *"try again"*)
      warn "$zone: $(reason)"
      return 1
      ;;
    *) die "$zone: $(reason)" ;;
  esac
}

# in_line: the same by a queued resource; it waits QUEUE_POLLS polls for its turn.
in_line() {
  local polls=0 status=0 said
  google queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    ${spot:+--spot} ${flags[@]+"${flags[@]}"} >&2 || refusal || return $?
  while [ -z "$dry" ]; do
    said=$(google queued-resources describe "$name" --format='value(state.state)') || said=unknown
    case "$said" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING)
        warn "$zone: the queued resource is $said"
        status=1
        break
        ;;
    esac
    polls=$((polls + 1))
    if [ "${QUEUE_POLLS:-60}" != 0 ] && [ "$polls" -ge "${QUEUE_POLLS:-60}" ] && [ "${#zone_list[@]}" -gt 1 ]; then
      warn "$zone: still ${said:-waiting}; trying the next zone"
      status=1
      break
    fi
    pause
  done
  [ "$status" = 0 ] || google queued-resources delete "$name" --force >&2 || warn "$zone: $(reason)"
  return "$status"
}

# create ROUNDS: goes round the zones until one gives the TPU; sets $zone.
create() {
  local round=0 left=("${zone_list[@]}") next status
  while :; do
    round=$((round + 1)) next=()
    for zone in "${left[@]}"; do
      say "asking $zone for ${spot:+spot }$type (round $round)"
      status=0
      if [ -n "$queued" ]; then in_line || status=$?; else ordinary || status=$?; fi
      case "$status" in
        0)
          [ -n "$dry" ] || { booked=$zone && echo "$name is in $zone"; return 0; }
          next+=("$zone")
          ;;
        1) next+=("$zone") ;;
        *) ;;
      esac
    done
    [ -z "$dry" ] || { zone=${zone_list[0]}; return 0; }
    [ "${#next[@]}" -gt 0 ] || die "none of ${zones//,/, } will give a $type; the reasons are above"
    left=("${next[@]}")
    [ "$1" = 0 ] || [ "$round" -lt "$1" ] || die "no room for a $type in ${zones//,/, } after $round rounds; try again later, or add zones"
    sleep "${ROUND_SECONDS:-60}"
  done
}

# remove: gives the TPU in $zone back, with its queued resource where it came by one.
remove() {
  if google queued-resources describe "$name" --format='value(name)' >"$aside/queue" && [ -s "$aside/queue" ]; then
    google queued-resources delete "$name" --force >&2
  else
    google tpu-vm delete "$name" >&2 || grep -q -i -E 'not[ _]?found' "$aside/said"
  fi || return 1
  booked=""
}

# on WORKER COMMAND: runs a command on a worker or on all, up to three tries: ssh to a new VM fails now and then.
on() {
  local try
  for try in 1 2 3; do
    google tpu-vm ssh "$name" --worker="$1" --command="$2" && return 0
    [ "$try" = 3 ] || { warn "try $try of 3: $(reason)"; sleep "${RETRY_SECONDS:-5}"; }
  done
  return 1
}

# copy FILE NAME: puts a file into every worker's home.
copy() {
  local try
  for try in 1 2 3; do
    google tpu-vm scp "$1" "$name:$2" --worker=all >&2 && return 0
    [ "$try" = 3 ] || { warn "try $try of 3: $(reason)"; sleep "${RETRY_SECONDS:-5}"; }
  done
  return 1
}

# send_secrets: what the trainer may need to know, in a file that only its owner can read, here and there.
send_secrets() {
  local file="$aside/secrets" key
  (umask 077 && : >"$file")
  if [ -n "$secrets" ]; then
    [ -r "$secrets" ] || die "secrets file $secrets: there is no such file, or it cannot be read"
    cat "$secrets" >>"$file"
    [ -z "$(tail -c 1 "$file")" ] || echo >>"$file"
  fi
  for key in WANDB_API_KEY HF_TOKEN; do
    [ -z "${!key:-}" ] || grep -q "^$key=" "$file" || printf '%s=%s\n' "$key" "${!key}" >>"$file"
  done
  [ -s "$file" ] || return 0
  # The file exists with its mode before anything is in it.
  on all 'rm -f .tpu_tune_secrets && install -m 600 /dev/null .tpu_tune_secrets' >&2 && copy "$file" .tpu_tune_secrets &&
    on all 'chmod 600 .tpu_tune_secrets' >&2
}

setup() {
  say "copying tpu_tune to all workers of $name"
  if [ -e "$project/.git" ]; then
    (cd "$project" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
      [ ! -f "$file" ] || printf '%s\0' "$file"
    done) >"$aside/files"
    tar -C "$project" --null -T "$aside/files" -czf "$aside/tpu_tune.tar.gz" || return 1
  else
    tar -C "$project" --exclude=./.venv --exclude=./.cache --exclude=./output --exclude=./runs -czf "$aside/tpu_tune.tar.gz" . ||
      return 1
  fi
  copy "$aside/tpu_tune.tar.gz" tpu_tune.tar.gz || return 1
  send_secrets || return 1
  say "installing on all workers"
  on all 'mkdir -p tpu_tune && tar -xzf tpu_tune.tar.gz -C tpu_tune && TPU_TUNE_JAX=tpu bash tpu_tune/launch/job.sh install'
}

# start: the same command on every worker; they find each other by themselves.
start() {
  local word given=""
  for word in "${train[@]}"; do
    case "$word" in --config.output_dir | --config.output_dir=*) given=1 ;; esac
  done
  [ -n "$given" ] || [ -z "$bucket" ] || train+=("--config.output_dir=gs://$bucket/$name")
  on all "TPU_TUNE_JAX=tpu bash tpu_tune/launch/job.sh start $(printf '%q ' "${train[@]}")"
}

need_train() {
  [ "${#train[@]}" -gt 0 ] || die "nothing to train: write the trainer's arguments after --, e.g. -- --config configs/qlora.py"
  refuse_local_paths
}

# jobs_state: sets $job to what all workers together are: running, finished, interrupted, failed (one of them is enough), unknown.
jobs_state() {
  local said words
  job=unknown
  # A TPU that was booked and not set up has no job.sh yet.
  said=$(on all '[ ! -f tpu_tune/launch/job.sh ] && echo tpu_tune job: none || bash tpu_tune/launch/job.sh state') || return 0
  words=$(sed -n 's/^.*tpu_tune job: //p' <<<"$said" | sort -u)
  case "$words" in
    "") return 0 ;;
    *failed* | *killed* | *none*) job=$(grep -m 1 -E 'failed|killed|none' <<<"$words") ;;
    *running* | *starting*) job=running ;;
    *interrupted*) job=interrupted ;;
    *) job=finished ;;
  esac
}

last_words() { on 0 'bash tpu_tune/launch/job.sh logs 5' || true; }

# go: sets up and starts; what cannot be done now is tried again at the next poll.
go() {
  if ! setup || ! start; then warn "$name could not be set up: $(reason)"; fi
}

bring_up() {
  create "${rounds:-0}"
  go
}

babysit() {
  local restarts=0 healthy=0
  while :; do
    locate
    case "$state" in
      READY)
        jobs_state
        case "$job" in
          running)
            healthy=$((healthy + 1))
            [ "$healthy" -lt 10 ] || restarts=0
            ;;
          finished)
            say "the run has ended"
            last_words
            [ -z "$delete" ] || remove || die "$zone: $(reason)"
            return 0
            ;;
          unknown) warn "$name does not answer: $(reason)" ;;
          *)
            healthy=0 restarts=$((restarts + 1))
            if [ "$restarts" -gt "${MAX_RESTARTS:-3}" ]; then
              last_words
              die "the job is $job again after ${MAX_RESTARTS:-3} restarts; the end of worker 0's log is above"
            fi
            say "the job is $job: starting it (restart $restarts of ${MAX_RESTARTS:-3})"
            # The workers that still run wait for the one that does not.
            on all 'bash tpu_tune/launch/job.sh stop --now' >&2 || true
            # A TPU on which the set-up had not got to its end has no environment yet; elsewhere this takes seconds.
            go
            ;;
        esac
        ;;
      absent)
        say "there is no $name yet"
        bring_up
        ;;
      unknown) ;; # said by look
      CREATING | STARTING | RESTARTING | REPAIRING | DELETING) say "$name is $state" ;;
      *)
        say "$name is $state: booking another one; the run goes on from its last checkpoint"
        restarts=0 healthy=0
        if remove; then bring_up; else warn "$zone: $(reason)"; fi
        ;;
    esac
    [ -z "$dry" ] || return 0
    pause
  done
}

case "$command" in
  create) create "${rounds:-60}" ;;
  setup)
    need_ready
    setup || die "$name could not be set up: $(reason)"
    ;;
  start)
    need_train
    need_ready
    start || die "not started on all workers: $(reason)"
    ;;
  logs)
    need_ready
    on "$worker" "bash tpu_tune/launch/job.sh $([ -z "$follow" ] && echo "logs $lines" || echo follow)" || die "$(reason)"
    ;;
  status)
    locate
    echo "$name: $state${state:+ ($zone)}"
    # shellcheck disable=SC2016 # it is the worker that shall say its name
    [ "$state" != READY ] || on all 'echo "$(hostname): $(bash tpu_tune/launch/job.sh state)"' || die "$(reason)"
    ;;
  stop)
    need_ready
    on all "bash tpu_tune/launch/job.sh stop $now" || die "$(reason)"
    ;;
  delete)
    locate
    [ "$state" != absent ] || { echo "there is no $name in ${zones//,/, }"; exit 0; }
    remove || die "$zone: $(reason)"
    [ -n "$dry" ] || echo "$name is deleted"
    ;;
  babysit)
    need_train
    [ -n "$bucket" ] || [[ " ${train[*]} " == *output_dir=gs://* ]] ||
      die "babysit needs a bucket for the checkpoints, which outlives the TPU: give --bucket NAME"
    babysit
    ;;
esac
