"""The check before training whether a job fits this machine's devices, before anything is downloaded or loaded."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from tpu_tune.cli.common import say
from tpu_tune.errors import UserError

log = logging.getLogger("tpu_tune")


def check_memory(config: Any, max_bytes: float | None = None, ask_compiler: bool = True) -> dict[str, Any] | None:
    """Plan the job for this machine's devices; return the plan's figures, None where there is none.

    Nothing is checked for a run that has checkpoints, since it ran before, nor on a CPU without `max_bytes`. A plan
    that cannot be made is no reason not to train.

    Args:
      config: the whole configuration.
      max_bytes: bytes that a device may take; if there is no compiler for this machine, bytes are only counted.
      ask_compiler: False only counts bytes, in seconds, for `as_planned`: whether the job fits is not judged.

    Raises:
      UserError: the job does not fit; the plan's table is on standard error.
    """
    from tpu_tune import planning

    checkpoints = os.path.join(config.output_dir, "checkpoints")
    if os.path.isdir(checkpoints) and os.listdir(checkpoints):
        return None
    local = planning.local_device()
    device = local if max_bytes is None else planning.local_device_within(max_bytes)
    if device is None:
        return None
    compile = local is not None and ask_compiler
    log.info("does it fit? %s; --no-check skips this", planning.what_a_plan_does(device, compile))
    try:
        figures = planning.plan(config, device, None, compile)
    except UserError:
        return None  # training reports it with more context
    except Exception as error:
        log.warning("the memory could not be checked beforehand (%s: %s)", type(error).__name__, error)
        return None
    log.info("%s (compiler: %s)", planning.verdict(figures), figures["compiler"])
    if figures["fits"] or not ask_compiler or (compile and figures["compiler"].startswith("none")):
        return figures if local is not None else None  # the stand-in for a CPU is no measure of its speed
    print(planning.table(figures), file=sys.stderr)
    if max_bytes is not None and device.capacity <= max_bytes:
        raise UserError(f"this job takes more than {max_bytes / 1e6:,.4g} MB of a device; {_advice(config, device)}")
    raise UserError(
        f"this job does not fit {device.name}; find settings that do with tpu-tune plan --suggest --device "
        f"'{device.name}' and the same --config, or start it anyway with --no-check"
    )


def as_planned(config: Any, figures: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """Return the configuration with what a plan has chosen in it, and what the run's summary is to say of the plan.

    Both choice and expected speed are said aloud. Of several processes process 0's choice counts, since all have to run
    the same program. Without figures the configuration is as it was.
    """
    from tpu_tune import planning
    from tpu_tune.training import distributed

    ways, chosen = planning.choice.ways(config), (figures or {}).get("chosen")
    number = ways.index(planning.choice.way_of(config, chosen)) if chosen else -1
    number = distributed.from_main([number], "how a step is run")[0]
    if number >= 0:
        config = planning.choice.with_overrides(config, ways[number])
    if not figures:
        return config, {}
    time = figures["step"]["time"]
    facts: dict[str, Any] = {"estimate": {**time, "device": figures["device"]}}
    if chosen:
        facts["chosen"] = chosen
        say(planning.choice.words(chosen))
    for line in planning.time_lines(time):
        say(line.strip())
    return config, facts


def _advice(config: Any, device: Any) -> str:
    from tpu_tune import planning

    suggestion = planning.suggest(config, device, compile=False)
    if suggestion["overrides"]:
        return f"by an estimate it fits with {planning.override_flags(suggestion['overrides'])}"
    return "no settings that were tried take less; lower data.max_length, or take a smaller model or more devices"
