"""What a plan says of time: of a compiled step by its operations, without a compiler by the work at a stated share.

`seconds`, `kinds` (where the time goes, in seconds) and `how` (which of the ways it comes from) make a plan's `time`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tpu_tune.planning import gpu_time, program_time, tpu_time
from tpu_tune.planning.devices import Device
from tpu_tune.planning.flops import ROOFLINE_SHARE

log = logging.getLogger(__name__)


def of_program(text: str, device: Device, dump: str = "") -> dict[str, Any] | None:
    """Return the time of a program that a device's compiler has written.

    Args:
      text: `compiled.as_text()`.
      device: what it was compiled for.
      dump: a directory with the bundles of a TPU's kernels, or "".

    Returns:
      None where it cannot be read, as after a change of the compiler's language: a plan's memory counts all the same.
    """
    try:
        found, how = tpu_time.estimate(text, device, dump) if device.kind == "tpu" else gpu_time.estimate(text, device)
    except (OSError, KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError) as error:
        log.warning("the compiled step's time could not be read (%s: %s)", type(error).__name__, error)
        return None
    return program_time.summary(found, how) if program_time.total(found) > 0 else None


def by_work(roofline_seconds: float, bound_by: str) -> dict[str, Any]:
    """Return the time of a step by its roofline at `ROOFLINE_SHARE`: nothing is known of where it goes."""
    what = "FLOPs" if bound_by == "computing" else "bytes"
    return {
        "seconds": roofline_seconds / ROOFLINE_SHARE,
        "kinds": {},
        "how": f"by {what} at {ROOFLINE_SHARE:.0%} of the device's peak",
    }


def rates(time: Mapping[str, Any], tokens: int, flops: float, device: Device) -> dict[str, Any]:
    """Return a step's time with `tokens_per_second` of all devices, and `mfu` (the model's FLOPs of the peak)."""
    seconds = time["seconds"]
    return {
        **time,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / (device.flops * device.count),
    }
