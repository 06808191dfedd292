#!/usr/bin/env bash
# From a fresh clone to a QLoRA-tuned language model, in one command: bash launch/quickstart.sh [--config.key=value ...]
# Makes an environment, installs, fetches SmolLM2-135M-Instruct and the ChatterBot conversations, trains, and shows the
# model's answers before and after. Run again, it goes on where it stopped, or says that all is done.
# Without an accelerator expect about ten minutes on two cores, most of them training. What follows the command is handed
# to `tpu-tune train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$project"

prompts=(
  "Who are you?"
  "What is AI?"
  "Tell me a joke"
  "What do robots need to survive?"
)
run=output/quickstart # output_dir in configs/quickstart.py
for argument in "$@"; do
  case "$argument" in --config.output_dir=*) run="${argument#*=}" ;; esac
done

use_environment
jax=$(choose_jax)
echo "jax build: $jax"
set_up_jax "$jax"
install_project "$(extras_of "$jax")"

say "fetching the model and the conversations"
folders=$(python launch/fetch.py base chats) || die "fetching failed; the reason is above"
{ read -r base && read -r chats; } <<<"$folders"
cache="${TPU_TUNE_CACHE:-$HOME/.cache/tpu_tune}"
export TPU_TUNE_CACHE="$cache"
python launch/chats_to_jsonl.py "$chats" "$cache/quickstart/chats.jsonl"
model=$(echo "$base"/*.gguf)

ask() { # ask [OPTIONS...]: the prompts' answers
  local prompt arguments=()
  for prompt in "${prompts[@]}"; do arguments+=(--prompt "$prompt"); done
  tpu-tune generate --model "$model" --greedy --max-new-tokens 48 "${arguments[@]}" "$@" </dev/null
}

say "the model's answers before training"
ask

say "training: LoRA over weights stored in four bits (stop it with Ctrl-C; the same command goes on)"
tpu-tune train --config configs/quickstart.py "$@" </dev/null

[ -f "$run/adapter/adapter_config.json" ] || die "training has not finished; the same command goes on where it stopped"

say "the same questions after training"
ask --adapter "$run/adapter"

case "$run" in /*) ;; *) run="$project/$run" ;; esac
cat <<END

== done; everything is in $run
  report.html     what the curves say, and all about the run, to open in a browser
  curves.png      training and evaluation loss
  metrics.jsonl   every logged step, one JSON object a line
  adapter/        the trained adapter, in PEFT's format
  checkpoints/    what resuming needs
  config.json     the run's whole configuration

Next (first: source $VIRTUAL_ENV/bin/activate):
  tpu-tune generate --model $model --adapter $run/adapter --prompt "Do you dream?"
  tpu-tune inspect $model
  tpu-tune export --help        an adapter with the base that PEFT should load, or a merged Hugging Face model
  configs/qlora.py              the same for your own model and data: copy it, and change model.path and data.train

In PyTorch, over the base that \`tpu-tune export --base\` writes:
  from peft import PeftModel
  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "$run/adapter")
END
