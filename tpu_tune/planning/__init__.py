"""Will it fit, and how long will it take: answered by the real compilers, before anything is booked or downloaded.

config, device -> job -> (a process of its own: the real step from shapes, compiled) -> figures -> table
"""

from tpu_tune.planning.devices import NAMES, Device, device_of, find_device
from tpu_tune.planning.figures import plan
from tpu_tune.planning.here import device_here, device_within
from tpu_tune.planning.report import advice, table, verdict
from tpu_tune.planning.suggest import suggest

__all__ = [
    "NAMES",
    "Device",
    "advice",
    "device_here",
    "device_of",
    "device_within",
    "find_device",
    "plan",
    "suggest",
    "table",
    "verdict",
]
