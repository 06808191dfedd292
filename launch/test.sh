#!/usr/bin/env bash
# Install tpu_tune with what its tests need and run them: bash launch/test.sh [PYTEST ARGUMENTS...]
#   bash launch/test.sh tests/test_config.py -x
#   bash launch/test.sh -m slow
# With CI=true or TPU_TUNE_PARITY=1, torch, peft, bitsandbytes and lm_eval are installed too, and compared with live;
# without them those tests compare with stored numbers, or are skipped. With CI=true or TPU_TUNE_CUDA_COMPILER=1 the CUDA
# plugin comes too (0.7 GB), whose compiler the tests of tests/compile ask about GPUs; without it these are skipped. With
# CI=true a Chromium is installed from Debian or Ubuntu where there is none, to open the HTML reports in; without one
# elsewhere, those tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$project"

use_environment
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

# cpu_torch: whether pip would bring torch's build for the CPU. Where only the large CUDA one is at hand, go without.
cpu_torch() {
  local report
  report=$(python -m pip --disable-pip-version-check install --quiet --dry-run --no-deps --ignore-installed \
    --only-binary :all: --report - torch==2.13.0 </dev/null 2>/dev/null) &&
    [[ "$report" =~ \"version\":\ *\"2\.13\.0\+cpu\" ]]
}

# has_browser: whether there is a browser for tests/test_report.py.
has_browser() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then return 0; fi
  done
  return 1
}

# install_browser: Debian's Chromium, which takes root.
install_browser() {
  export DEBIAN_FRONTEND=noninteractive
  retry apt-get update -qq </dev/null >/dev/null &&
    retry apt-get install -y -qq --no-install-recommends chromium </dev/null >/dev/null
}

extras="test"
if [ "${CI:-}" = true ] || [ "${TPU_TUNE_CUDA_COMPILER:-}" = 1 ]; then extras+=,cuda-compiler; fi
if [ "${CI:-}" != true ] && [ "${TPU_TUNE_PARITY:-}" != 1 ]; then
  install_project "$extras"
elif cpu_torch; then
  install_project "$extras,parity" torch==2.13.0
else
  warn "no CPU build of torch is to be had for this Python: the parity tests use their stored numbers"
  install_project "$extras"
fi

if [ "${CI:-}" = true ] && ! has_browser; then
  say "installing Chromium"
  # On CI the tests fail without it, so that they are not left out unseen.
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then install_browser || warn "no Chromium is to be had"; fi
fi

say "ruff check"
python -m ruff check .
say "pytest"
# The whole suite runs in a process a core (each takes up to 5 GB of memory), whole files together: they share models.
cores=$(nproc 2>/dev/null || echo 1)
if [ $# = 0 ] && [ "$cores" -gt 1 ]; then set -- -n "$((cores < 4 ? cores : 4))" --dist loadfile; fi
exec python -m pytest "$@"
