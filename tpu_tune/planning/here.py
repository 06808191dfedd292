"""The devices of this machine, as a plan knows them."""

from __future__ import annotations

import dataclasses

import jax

from tpu_tune.planning.devices import Device, device_of


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
