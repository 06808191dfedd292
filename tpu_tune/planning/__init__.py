"""Whether a job fits a device, and how long it takes: answered by the device's compiler, without device or weights.

`figures.plan` sends a configuration and a device to a separate process (`compile_process`), which compiles the real
training step from shapes (`compile_step`); it turns the result into figures, and `plan_text` these into a table.
`suggest` searches for the largest batch that fits.
"""

from tpu_tune.planning.devices import NAMES, Device, device_of, find_device
from tpu_tune.planning.figures import plan
from tpu_tune.planning.local_devices import local_device, local_device_within
from tpu_tune.planning.plan_text import advice, override_flags, table, verdict
from tpu_tune.planning.suggest import suggest

__all__ = [
    "NAMES",
    "Device",
    "advice",
    "device_of",
    "find_device",
    "local_device",
    "local_device_within",
    "override_flags",
    "plan",
    "suggest",
    "table",
    "verdict",
]
