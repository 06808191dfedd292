"""Run `compile_step` in a process of its own, with an environment that exists there only."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError

TIMEOUT = 1800.0  # seconds; a 7B step takes one to two minutes on two idle cores

_PACKAGES = str(pathlib.Path(__file__).resolve().parents[2])  # what holds tpu_tune
# What would make jax or libtpu look for devices, for other hosts, or for a cache of compiled programs.
_LEFT_OUT = ("TPU_", "JAX_PLATFORMS", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COMPILATION_CACHE")


def environment(kind: str) -> dict[str, str]:
    """Return the environment of the compiling process, for a device of this kind (tpu | gpu)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
    flags = kept.pop("XLA_FLAGS", "").split() if kind == "gpu" else []  # TPU flags are LIBTPU_INIT_ARGS
    kept.pop("XLA_FLAGS", None)
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    path = os.pathsep.join(part for part in (kept.get("PYTHONPATH"), _PACKAGES) if part)
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        **({"XLA_FLAGS": " ".join(flags)} if flags else {}),
        # libtpu: look for no machine, load beside a job that has the chips, write no logs.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        # The CUDA plugin: load without a driver, and touch no card that is there.
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_job(job: Mapping[str, Any], kind: str, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Return what `compile_step.measure` says of a job; its bytes alone where the compiler fails or takes too long.

    Args:
      job: see `compile_step.measure`.
      kind: tpu | gpu.
      timeout: seconds.

    Raises:
      UserError: settings that do not fit the model or the devices.
      RuntimeError: not even the bytes can be counted.
    """
    words = [sys.executable, "-m", "tpu_tune.planning.compile_step"]
    try:
        done = subprocess.run(
            words, input=json.dumps(job), env=environment(kind), capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        why = f"the compiler took more than {timeout:.0f} s"
    else:
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            found = json.loads(lines[-1])
            if "user_error" in found:
                raise UserError(found["user_error"])
            return found
        why = f"the compiler failed: {_reason(done)}"
    if not job["compile"]:
        raise RuntimeError(f"the plan's own process failed ({why})")
    return {**run_job({**job, "compile": False}, kind, timeout), "why": why}


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it was killed by signal {-done.returncode}; too little memory on this machine is the usual reason"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return " ".join((errors or lines or [f"status {done.returncode}"])[-1].split())[:300]
