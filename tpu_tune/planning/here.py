"""The devices of this machine, as a plan knows them."""

from __future__ import annotations

import dataclasses

import jax

from tpu_tune.planning.devices import Device, device_of, find_device


def device_here() -> Device | None:
    """Return the devices that jax runs on, with the memory that it may really use; None on a CPU or an unknown card."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return None
    found = device_of(devices[0].device_kind, len(devices))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if found is None or not limit:
        return found
    return dataclasses.replace(found, capacity=limit, capacity_note="what jax may use here")


def device_within(most: float) -> Device:
    """Return the devices of this machine with no more memory on each than `most` bytes.

    A CPU and an unknown card are given a known card's name for kernels and speed; only bytes can be counted for them.
    """
    found = device_here()
    if found is None:
        count = len(jax.devices())
        name = "this machine" if count == 1 else f"this machine's {count} devices"
        found = dataclasses.replace(find_device(f"h200 x{count}"), name=name, capacity=int(most) + 1)
    if found.capacity <= most:
        return found
    return dataclasses.replace(found, capacity=int(most), capacity_note="what was allowed")
