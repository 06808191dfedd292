#!/usr/bin/env bash
# Train on this machine's NVIDIA GPU or GPUs: bash launch/gpu.sh [COMMAND] [ARGUMENTS...]
#   bash launch/gpu.sh --config configs/qlora.py --config.model.path=DIR --config.data.train=chats.jsonl
#       installs what is missing (jax for CUDA 13 or 12, by the driver), then trains in tmux, or under nohup where there
#       is none. A dropped login does not stop it. The same command goes on where a stopped run was.
#   bash launch/gpu.sh run --config ...   the same in the foreground
#   bash launch/gpu.sh install            the installation alone
#   bash launch/gpu.sh state | logs [LINES] | follow | stop [--now]
#   bash launch/gpu.sh --dry-run ...      say what would be done
# The environment:
#   XLA_PYTHON_CLIENT_MEM_FRACTION  share of the GPU's memory for jax: 0.92, where jax by itself takes 0.75
#   CUDA_VISIBLE_DEVICES            which GPUs; all of them otherwise, in one process
#   TPU_TUNE_JAX                    cuda13 | cuda12: do not look at the driver
#   TPU_TUNE_EXTRAS=gcs             where output_dir or data.train are gs:// paths
#   WANDB_API_KEY, HF_TOKEN         are handed on as they stand in the environment, or from ~/.tpu_tune_secrets
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=yes
  shift
fi
case "${1:-}" in
  -h | --help) usage && exit 0 ;;
  "") usage >&2 && die "nothing to do: give --config FILE, or a command" ;;
  -*) command=start ;;
  install | run | start) command=$1 && shift ;;
  state | logs | follow | stop)
    [ -z "$dry" ] || { printf '+ %s\n' "job.sh $*"; exit 0; }
    exec bash "$project/launch/job.sh" "$@"
    ;;
  *) die "gpu.sh knows install, start, run, state, logs, follow and stop, not '$1'; see --help" ;;
esac

build=$(choose_jax)
case "$build" in
  cuda*) ;;
  *) die "no usable NVIDIA GPU here (jax build: $build); set TPU_TUNE_JAX=cuda12 or cuda13 if there is one" ;;
esac
export TPU_TUNE_JAX="$build"
set_up_jax "$build"
echo "jax build: $build; memory fraction: $XLA_PYTHON_CLIENT_MEM_FRACTION"
if [ -n "$dry" ]; then
  echo "+ job.sh install"
  [ "$command" = install ] || printf '+ job.sh %s\n' "$(printf '%q ' "$command" "$@")"
  exit 0
fi
bash "$project/launch/job.sh" install
[ "$command" != install ] || exit 0
exec bash "$project/launch/job.sh" "$command" "$@"
