"""Run `compile_step`: its compiler in a process of its own, with variables that only the compiler should see."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax

from tpu_tune.errors import UserError
from tpu_tune.planning.bundles import dump_flags
from tpu_tune.planning.compile_step import measure, missing_compiler
from tpu_tune.planning.devices import Device

TIMEOUT = 1800.0  # seconds
_USUAL = {
    "gpu": "about a minute",
    "tpu": "three to six minutes",
}  # measured of 0.1B and 7B: 33 s, and 240 to 310 s of one core
_WITH_KERNELS = "ten to thirty minutes, its kernels' bundles written and read"

_PACKAGE_PARENT = str(pathlib.Path(__file__).resolve().parents[2])
# Variables by which jax or libtpu would look for devices, for other hosts, or for a cache of compiled programs.
_REMOVED = ("TPU_", "JAX_PLATFORMS", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COMPILATION_CACHE")


def environment(kind: str) -> dict[str, str]:
    """Return the environment variables of the compiling process, for a device of this kind (tpu | gpu)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_REMOVED)}
    flags = kept.pop("XLA_FLAGS", "").split() if kind == "gpu" else []  # TPU flags are LIBTPU_INIT_ARGS
    kept.pop("XLA_FLAGS", None)
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    path = os.pathsep.join(part for part in (kept.get("PYTHONPATH"), _PACKAGE_PARENT) if part)
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        **({"XLA_FLAGS": " ".join(flags)} if flags else {}),
        # libtpu: do not look for a TPU machine, load even if another process uses the chips, write no logs.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        # The CUDA plugin: load without a driver, and use no GPU of this machine.
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def what_a_plan_does(device: Device, compile: bool = True, kernels: bool = False) -> str:
    """Return in words what a plan for a device does, and about how long that takes."""
    platform = str(device.topology["platform"])
    if not compile:
        return f"counting bytes for {device.name}: seconds"
    if missing_compiler(platform):
        return f"counting bytes for {device.name}, whose compiler is not installed: seconds"
    takes = _WITH_KERNELS if kernels and device.kind == "tpu" else _USUAL[device.kind]
    return f"compiling the training step for {device.name}, which need not be here: {takes}"


def count_here(devices: int) -> None:
    """Have `run_job` count bytes in this process, unless JAX has begun: it then has these CPU devices and no others."""
    with contextlib.suppress(RuntimeError):  # it has begun
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")


def _counts_here(devices: int) -> bool:
    return jax.config.jax_platforms == "cpu" and len(jax.devices()) >= devices


def run_job(job: Mapping[str, Any], kind: str, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Return the result of `compile_step.measure`; if the compiler fails or takes too long, only counted bytes.

    Bytes are counted in this process where it has enough CPU devices and none of another kind.

    Args:
      job: argument of `compile_step.measure`; with `kernels` the bundles of a TPU's kernels are dumped for it, into a
        directory that is deleted afterwards, and it may take twice as long.
      kind: tpu | gpu.
      timeout: seconds that the process may take.

    Raises:
      UserError: settings that do not fit the model or the devices.
      RuntimeError: not even the bytes can be counted.
    """
    if not job["compile"] and _counts_here(job["count"]):
        return measure(job)
    try:
        with tempfile.TemporaryDirectory(prefix="tpu_tune-plan-") as directory:
            done = _compile(job, kind, timeout, directory)
    except subprocess.TimeoutExpired as late:
        why = f"the compiler took more than {late.timeout:.0f} s"
    else:
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            result = json.loads(lines[-1])
            if "user_error" in result:
                raise UserError(result["user_error"])
            return result
        why = f"the compiler failed: {_reason(done)}"
    if not job["compile"]:
        raise RuntimeError(f"the planning process failed ({why})")
    return {**run_job({**job, "compile": False}, kind, timeout), "why": why}


def _compile(job: Mapping[str, Any], kind: str, timeout: float, directory: str) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, "-m", "tpu_tune.planning.compile_step"], environment(kind)
    if job.get("kernels") and kind == "tpu":
        flags = f"{variables.get('LIBTPU_INIT_ARGS', '')} {dump_flags(directory)}".strip()
        job, variables, timeout = {**job, "dump": directory}, {**variables, "LIBTPU_INIT_ARGS": flags}, 2 * timeout
    return subprocess.run(
        command, input=json.dumps(job), env=variables, capture_output=True, text=True, timeout=timeout
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it was killed by signal {-done.returncode}; the usual reason is too little memory on this machine"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return " ".join((errors or lines or [f"status {done.returncode}"])[-1].split())[:300]
