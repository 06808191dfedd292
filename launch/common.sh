# shellcheck shell=bash
# Shared by the launch scripts, which source it: finds or makes a Python environment and installs tpu_tune into it.
# Defines functions and sets nothing but $project; see quickstart.sh for the order of the calls.
#
# The environment decides where a user wants something else:
#   VIRTUAL_ENV      an active virtual environment is used as it is; otherwise .venv in the project is made
#   TPU_TUNE_JAX     tpu | cuda13 | cuda12 | cpu: do not look for the machine's accelerator
#   TPU_TUNE_PYTHON  the Python to make .venv with
#   TPU_TUNE_CACHE   downloads and tokenized data; ~/.cache/tpu_tune otherwise
#   TPU_TUNE_UV      a uv to install with instead of pip

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# retry COMMAND...: three tries, since package registries have bad moments.
retry() {
  local try
  for try in 1 2 3; do
    "$@" && return 0
    [ "$try" = 3 ] || { warn "try $try of 3 failed: $*"; sleep $((try * ${RETRY_SECONDS:-5})); }
  done
  return 1
}

# python_between PYTHON LOWEST HIGHEST: whether it runs (a shim may not) and its minor version 3.x is in that range.
python_between() {
  "$1" -c 'import sys; sys.exit(not (int(sys.argv[1]), ) <= sys.version_info[1:2] <= (int(sys.argv[2]), ))' \
    "$2" "$3" </dev/null >/dev/null 2>&1
}

# find_python LOWEST HIGHEST: prints the first Python 3.x of the machine in that range.
find_python() {
  local name path
  for name in ${TPU_TUNE_PYTHON:+"$TPU_TUNE_PYTHON"} python3.12 python3.11 python3; do
    # Every place on PATH counts: a version manager's shim that does not run may hide one that does.
    while IFS= read -r path; do
      if python_between "$path" "$1" "$2"; then
        printf '%s\n' "$path"
        return 0
      fi
    done < <(type -ap "$name" 2>/dev/null)
  done
  return 1
}

# bring_uv: prints the path of uv, installing one inside the project where the machine has none.
bring_uv() {
  local place="$project/.cache/uv" python
  if command -v uv; then return 0; fi
  if [ -x "$place/bin/uv" ]; then printf '%s\n' "$place/bin/uv"; return 0; fi
  for python in python3 python; do
    # A folder of its own: Debian's pip refuses to touch the system's packages.
    if "$python" -m pip --version </dev/null >/dev/null 2>&1 &&
      retry "$python" -m pip install --quiet --target "$place" uv </dev/null >&2 && [ -x "$place/bin/uv" ]; then
      printf '%s\n' "$place/bin/uv"
      return 0
    fi
  done
  if command -v curl >/dev/null; then
    mkdir -p "$place"
    if retry curl -LsSf -o "$place/install.sh" https://astral.sh/uv/install.sh &&
      UV_INSTALL_DIR="$place/bin" UV_NO_MODIFY_PATH=1 sh "$place/install.sh" </dev/null >&2; then
      printf '%s\n' "$place/bin/uv"
      return 0
    fi
  fi
  return 1
}

# make_environment PYTHON|VERSION FOLDER: a virtual environment with pip in it. Made aside: FOLDER is whole or absent.
make_environment() {
  local python="$1" folder="$2" uv
  rm -rf "$folder"
  if [ -x "$python" ]; then
    "$python" -m venv "$folder" </dev/null >/dev/null 2>&1 && return 0
    rm -rf "$folder" # Debian without python3-venv gets half of one
    "$python" -m virtualenv --quiet "$folder" </dev/null >/dev/null 2>&1 && return 0
    rm -rf "$folder"
    warn "$python cannot make virtual environments (Debian: apt-get install python3-venv); using uv"
  fi
  uv=$(bring_uv) || return 1
  # The machine's certificates, where it has some: uv's own do not hold a company's proxy.
  if [ -e /etc/ssl/certs/ca-certificates.crt ]; then export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1; fi
  retry "$uv" venv --quiet --clear --seed --python "$python" "$folder" </dev/null || { rm -rf "$folder"; return 1; }
}

# use_environment: activates a virtual environment with Python 3.11 or 3.12, making .venv where there is none.
use_environment() {
  local folder="$project/.venv" python
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    python_between "$VIRTUAL_ENV/bin/python" 11 99 ||
      die "the active virtual environment $VIRTUAL_ENV has no Python 3.11 or newer: leave it (deactivate) and start again"
    folder="$VIRTUAL_ENV"
  elif ! python_between "$folder/bin/python" 11 99 || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making a virtual environment in $folder"
    # 3.11 and 3.12 are what is tested; where neither can be had, a newer one is better than none.
    if python=$(find_python 11 12); then
      make_environment "$python" "$folder" || die "cannot make a virtual environment with $python"
    elif ! make_environment 3.11 "$folder"; then
      python=$(find_python 13 99) || die "no Python 3.11 or newer here, and uv could not bring one: install python3.11"
      warn "no Python 3.11 or 3.12 here: going on with $python, with which this is not tested"
      make_environment "$python" "$folder" || die "cannot make a virtual environment with $python"
    fi
  fi
  export VIRTUAL_ENV="$folder" PATH="$folder/bin:$PATH"
  unset PYTHONHOME PYTHONPATH
  python --version
}

# has_tpu [FOLDER]: whether a Google TPU is plugged in (the PCI ids jax knows; Google's network cards share the vendor).
has_tpu() {
  local device
  [ -z "${TPU_NAME:-}${ISTPUVM:-}" ] || return 0 # the second is of Kaggle's image
  for device in "${1:-/sys/bus/pci/devices}"/*; do
    [ "$(cat "$device/vendor" 2>/dev/null)" = 0x1ae0 ] || continue
    case "$(cat "$device/device" 2>/dev/null)" in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
    esac
  done
  return 1
}

# shellcheck disable=SC2120 # its argument, a folder of PCI devices, is for the tests
# choose_jax: prints the jax build for this machine, tpu | cuda13 | cuda12 | cpu.
choose_jax() {
  local driver capability gpus
  case "${TPU_TUNE_JAX:-}" in
    tpu | cuda13 | cuda12 | cpu) printf '%s\n' "$TPU_TUNE_JAX"; return 0 ;;
    "") ;;
    *) die "TPU_TUNE_JAX is '$TPU_TUNE_JAX'; it must be tpu, cuda13, cuda12 or cpu" ;;
  esac
  if has_tpu "$@"; then
    echo tpu
  elif ! command -v nvidia-smi >/dev/null; then
    echo cpu
  elif ! gpus=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader </dev/null 2>/dev/null) ||
    ! [[ "$gpus" =~ ^([0-9]+)[0-9.]*,\ *([0-9]+)\.([0-9]+) ]]; then
    warn "nvidia-smi is here but names no usable GPU (driver not loaded, or older than 525): using the CPU"
    echo cpu
  else
    driver=${BASH_REMATCH[1]} capability=$((BASH_REMATCH[2] * 10 + BASH_REMATCH[3]))
    if [ "$driver" -ge 580 ] && [ "$capability" -ge 75 ]; then # CUDA 13 left out what is older than Turing
      echo cuda13
    elif [ "$driver" -ge 525 ]; then
      echo cuda12
    else
      warn "the NVIDIA driver $driver is older than 525, which jax needs at least: using the CPU"
      echo cpu
    fi
  fi
}

# set_up_jax BUILD: what jax should find in the environment.
set_up_jax() {
  case "$1" in
    # A TPU's library may be installed for its compiler alone (the test extra); it is not to look for a device.
    cpu) export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" ;;
    # jax takes three quarters of a GPU's memory by itself.
    cuda*) export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" ;;
  esac
}

# extras_of BUILD [EXTRAS]: the extras to install, comma-separated: the jax build's own, `data` for `tpu-tune data`, more.
extras_of() {
  local build="$1" more="${2:-}"
  [ "$build" = cpu ] && build=""
  printf '%s\n' "${build:+$build,}data${more:+,$more}"
}

# install_stamp EXTRAS: a hash of all that decides what an installation holds.
install_stamp() {
  python - "$1" "$project" <<'PYTHON'
import hashlib, pathlib, sys
extras, project = sys.argv[1:]
stamp = hashlib.sha256(f"{extras} {project} {sys.version} {sys.prefix}".encode())
for name in ("setup.cfg", "pyproject.toml"):
    stamp.update(pathlib.Path(project, name).read_bytes())
print(stamp.hexdigest())
PYTHON
}

# pip_install ARGUMENTS...: quiet, three tries.
pip_install() {
  if [ -n "${TPU_TUNE_UV:-}" ]; then # several times faster, which counts where a preempted machine is set up anew
    retry "$TPU_TUNE_UV" pip install --quiet --python "$VIRTUAL_ENV/bin/python" "$@" </dev/null
    return
  fi
  retry python -m pip --disable-pip-version-check install --quiet --progress-bar off "$@" </dev/null
}

# install_project EXTRAS [REQUIREMENT...]: the project in editable form with these extras ("" for none, "a,b" for two),
# after the given requirements. Skipped when nothing has changed since the last time.
install_project() {
  local extras="$1" stamp file
  shift
  stamp="$(install_stamp "$extras $*")"
  file="$VIRTUAL_ENV/.tpu_tune-${extras:-plain}"
  if [ "$(cat "$file" 2>/dev/null)" = "$stamp" ]; then
    echo "installed already: tpu_tune${extras:+[$extras]}"
    return 0
  fi
  say "installing tpu_tune${extras:+[$extras]} (the first time takes a minute or more)"
  if [ $# -gt 0 ]; then pip_install "$@" || die "pip could not install $*; its message is above"; fi
  pip_install --editable "$project${extras:+[$extras]}" || die "pip could not install tpu_tune; its message is above"
  printf '%s\n' "$stamp" >"$file"
}
