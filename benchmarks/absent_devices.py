"""Devices of the catalogue for their compilers, none of them here: import this before anything imports jax."""

from __future__ import annotations

import os
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    CUDA_VISIBLE_DEVICES="",
)

from tpu_tune.planning.compile_step import find_devices  # noqa: E402 - it imports jax, which reads the environment
from tpu_tune.planning.devices import find_device  # noqa: E402


def devices_of(name: str) -> list[Any]:
    """Return the devices that a name of the catalogue stands for.

    Raises:
      RuntimeError: there is no compiler for them.
    """
    device = find_device(name)
    devices, compiler, why = find_devices({"topology": device.topology, "count": device.count, "compile": True})
    if not compiler:
        raise RuntimeError(why)
    return devices
