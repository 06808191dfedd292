#!/usr/bin/env bash
# The training machine's end of tpu.sh, gpu.sh and the SkyPilot files: installs tpu_tune, and trains in a session that a
# dropped login does not stop. One job a machine.
#   bash launch/job.sh install                  an environment, and tpu_tune with this machine's jax in it
#   bash launch/job.sh start --config FILE ...  `tpu-tune train` in tmux (or under nohup); the same arguments resume a run
#   bash launch/job.sh run --config FILE ...    the same in the foreground
#   bash launch/job.sh state                    one line: none | starting | running | finished | stopped early |
#                                               interrupted | failed STATUS | killed
#   bash launch/job.sh logs [LINES] | follow    the end of the log
#   bash launch/job.sh stop [--now]             save after the step that is running, then end; --now: end at once
# The environment (besides what common.sh knows):
#   TPU_TUNE_EXTRAS   more extras to install, e.g. gcs
#   TPU_TUNE_JOB      where log and state are; .cache/job in the project otherwise
#   TPU_TUNE_SECRETS  file of NAME=VALUE lines for the trainer's environment, ~/.tpu_tune_secrets otherwise
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$project"

job="${TPU_TUNE_JOB:-$project/.cache/job}"

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# alive: whether a job runs here. Its lock goes with its last process, so a pid used again or a reboot cannot mislead.
alive() { [ -e "$job/lock" ] && ! flock --nonblock 8 8<"$job/lock"; }

# read_secrets: exports what the secrets file holds; values are taken as they are, never evaluated or shown.
read_secrets() {
  local file="${TPU_TUNE_SECRETS:-$HOME/.tpu_tune_secrets}" name value
  [ -f "$file" ] || return 0
  [ -z "$(find "$file" -perm /077)" ] || die "$file can be read by others: chmod 600 $file"
  while IFS='=' read -r name value || [ -n "$name" ]; do
    [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] && export "$name=$value"
  done <"$file"
}

install_job() {
  local build
  TPU_TUNE_UV=$(bring_uv) || die "uv could not be had; see https://docs.astral.sh/uv"
  export TPU_TUNE_UV
  use_environment
  build=$(choose_jax)
  echo "jax build: $build"
  install_project "$(extras_of "$build" "${TPU_TUNE_EXTRAS:-}")"
}

# record TEXT: the job's state, whole or not at all.
record() { printf '%s\n' "$1" >"$job/state.new" && mv "$job/state.new" "$job/state"; }

run_job() {
  local build status=0 trainer
  mkdir -p "$job"
  exec 9>"$job/lock" # the trainer inherits it
  flock --nonblock 9 || die "a job runs here already (bash launch/job.sh logs, or stop)"
  record "failed 1" # what stays if the lines up to the trainer's start do not go well
  : >"$job/result"
  rm -f "$job/pid"
  say "$(date -u +%FT%TZ) tpu-tune train $*"
  use_environment
  build=$(choose_jax)
  set_up_jax "$build"
  read_secrets
  record running
  tpu-tune train --json "$@" </dev/null >"$job/result" &
  trainer=$!
  printf '%s\n' "$trainer" >"$job/pid"
  # Signals are for the trainer, which saves and ends; this script only waits for it.
  trap 'kill -TERM "$trainer" 2>/dev/null || true' INT TERM HUP
  wait "$trainer" || status=$?
  while kill -0 "$trainer" 2>/dev/null; do # wait returns early when a signal comes
    status=0
    wait "$trainer" || status=$?
  done
  cat "$job/result"
  # A run that a signal has stopped says so, saved what it had, and ends with 130 or 143.
  if [ "$status" != 0 ] && ! grep -q '"status": *"interrupted"' "$job/result"; then
    record "failed $status"
  elif [[ "$(cat "$job/result")" =~ \"status\":\ *\"([a-z\ ]+)\" ]]; then
    record "${BASH_REMATCH[1]#already }"
  else
    record finished
  fi
  return "$status"
}

start_job() {
  local command
  mkdir -p "$job"
  if alive; then
    echo "a job runs here already; nothing started"
    return 0
  fi
  record starting
  command="bash $(printf '%q ' "$project/launch/job.sh" run "$@") >>$(printf '%q' "$job/log") 2>&1"
  if command -v tmux >/dev/null; then
    # A server of our own takes this environment; one that the user already runs would keep its own.
    tmux -L tpu_tune kill-server 2>/dev/null || true
    tmux -L tpu_tune new-session -d -s tpu_tune "exec bash -c $(printf '%q' "$command")"
  else
    nohup bash -c "$command" </dev/null >/dev/null 2>&1 &
  fi
  echo "started; log: $job/log"
}

state_job() {
  local state=none
  [ ! -f "$job/state" ] || state=$(cat "$job/state")
  # A job that took its lock writes how it ended; one that did not has lost its machine or its memory.
  [ "$state" != running ] || alive || state=killed
  printf 'tpu_tune job: %s\n' "$state"
}

stop_job() {
  local pid
  alive || { echo "no job runs here"; return 0; }
  pid=$(cat "$job/pid" 2>/dev/null) || die "the job is still starting; try again in a moment"
  if [ "${1:-}" = --now ]; then
    kill -KILL "$pid" 2>/dev/null || true
    flock --wait 10 8 8<"$job/lock" || die "process $pid does not end"
    echo "killed"
  else
    kill -TERM "$pid" 2>/dev/null || true
    echo "stopping: it saves after the step that is running"
  fi
}

case "${1:-}" in
  install) install_job ;;
  run) shift && run_job "$@" ;;
  start) shift && start_job "$@" ;;
  state) state_job ;;
  logs) tail -n "${2:-100}" "$job/log" 2>/dev/null || echo "no log yet" ;;
  follow) exec tail -n 100 -F "$job/log" ;;
  stop) shift && stop_job "$@" ;;
  -h | --help) usage ;;
  *) die "job.sh knows install, start, run, state, logs, follow and stop, not '${1:-}'; see --help" ;;
esac
