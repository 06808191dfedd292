"""Whether a job fits a device, and how long it takes: answered by the device's compiler, without device or weights.

`figures.plan` sends a configuration and a device to a separate process (`compile_process`), which compiles the real
training step from shapes (`compile_step`); it turns the result into figures, and `plan_text` these into a table.
`suggest` searches for the largest batch that fits, and where there is none for what would fit (`ways`).
"""

from tpu_tune.planning import choice
from tpu_tune.planning.cards import GENERATIONS, by_memory
from tpu_tune.planning.compile_process import count_here, what_a_plan_does
from tpu_tune.planning.devices import NAMES, Device, device_of, find_device, split_names
from tpu_tune.planning.figures import plan
from tpu_tune.planning.local_devices import local_device, local_device_within
from tpu_tune.planning.plan_text import advice, best_of, comparison, override_flags, table, time_lines, verdict
from tpu_tune.planning.suggest import suggest

__all__ = [
    "GENERATIONS",
    "NAMES",
    "Device",
    "advice",
    "best_of",
    "by_memory",
    "choice",
    "comparison",
    "count_here",
    "device_of",
    "find_device",
    "local_device",
    "local_device_within",
    "override_flags",
    "plan",
    "split_names",
    "suggest",
    "table",
    "time_lines",
    "verdict",
    "what_a_plan_does",
]
