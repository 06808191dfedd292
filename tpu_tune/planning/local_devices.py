"""This machine's devices as entries of the catalogue, with the memory that is really available."""

from __future__ import annotations

import dataclasses

import jax

from tpu_tune.planning.devices import Device, device_of, find_device


def local_device() -> Device | None:
    """Return the devices that jax runs on, with the memory that it may really use; None on a CPU or an unknown GPU."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return None
    device = device_of(devices[0].device_kind, len(devices))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if device is None or not limit:
        return device
    return dataclasses.replace(device, capacity=limit, capacity_note="what jax may use on this machine")


def local_device_within(max_bytes: float) -> Device:
    """Return this machine's devices, each limited to `max_bytes` of memory.

    A CPU and an unknown GPU get a known GPU's properties for kernels and speed; a plan can only count their bytes.
    """
    device = local_device()
    if device is None:
        count = len(jax.devices())
        name = "this machine" if count == 1 else f"this machine's {count} devices"
        device = dataclasses.replace(find_device(f"h200 x{count}"), name=name, capacity=int(max_bytes) + 1)
    if device.capacity <= max_bytes:
        return device
    return dataclasses.replace(device, capacity=int(max_bytes), capacity_note="the given limit")
