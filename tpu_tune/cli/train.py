"""`tpu-tune train`: plan for this machine's devices, train, and say where the results are."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from typing import Any

from tpu_tune.cli.common import Commands, read_config
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "train",
        run,
        "train, or go on with a run that is in output_dir",
        "tpu-tune train --config configs/qlora.py --config.model.path=DIR --config.data.train=chats.jsonl",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="config file; --config.KEY=VALUE overrides a key"
    )

    parser.add_argument(
        "--no-check", action="store_true", help="start without asking the compiler first whether the job fits"
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    config = read_config(options)
    from tpu_tune.training import distributed

    with distributed.leaving_alone():
        distributed.join()
    if not options.no_check:
        _check_memory(config)
    return start(config, options.json)


def start(config: Any, as_json: bool) -> int:
    """Train, and say where the results are; the hosts have been joined. Return the exit status."""
    import tpu_tune
    from tpu_tune.training import distributed

    # With --json standard output holds nothing but JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        with distributed.leaving_alone():
            run = tpu_tune.train(config)
    if as_json:
        print(
            json.dumps({"status": run.status, "step": run.step, "output_dir": run.output_dir, "result": run.result_dir})
        )
    elif run.status != "interrupted":
        from tpu_tune.checkpoints import storage

        curves = os.path.join(run.output_dir, "curves.png")
        print(
            f"metrics: {os.path.join(run.output_dir, 'metrics.jsonl')}"
            + (f"; curves: {curves}" if storage.exists(curves) else "")
        )
    return 0


def _check_memory(config: Any, most: float | None = None) -> None:
    """Plan for the devices of this machine, before anything is downloaded or loaded.

    Args:
      config: the whole configuration.
      most: bytes that a device may take; where there is no compiler for this machine, they are counted.

    Raises:
      UserError: the job does not fit; the table is on standard error.
    """
    from tpu_tune import planning

    log = logging.getLogger("tpu_tune")
    checkpoints = os.path.join(config.output_dir, "checkpoints")
    if os.path.isdir(checkpoints) and os.listdir(checkpoints):
        return  # it has run before
    here = planning.device_here()
    device = here if most is None else planning.device_within(most)
    if device is None:
        return
    compile = here is not None
    log.info(
        "does it fit %s? (%s; --no-check leaves it out)",
        device.name,
        "compiling the step beforehand" if compile else "counting bytes",
    )
    try:
        figures = planning.plan(config, device, None, compile)
    except UserError:
        return  # training says it better
    except Exception as error:  # a plan that cannot be made is no reason not to train
        log.warning("the memory could not be checked beforehand (%s: %s)", type(error).__name__, error)
        return
    log.info("%s (compiler: %s)", planning.verdict(figures), figures["compiler"])
    if figures["fits"] or (compile and figures["compiler"].startswith("none")):
        return
    print(planning.table(figures), file=sys.stderr)
    if most is not None and device.capacity <= most:
        raise UserError(f"this job takes more than {most / 1e6:,.4g} MB of a device; {_advice(config, device)}")
    raise UserError(
        f"this job does not fit {device.name}; tpu-tune plan --suggest --device '{device.name}' with the same --config "
        "looks for one that does, and --no-check trains all the same"
    )


def _advice(config: Any, device: Any) -> str:
    from tpu_tune import planning

    found = planning.suggest(config, device, compile=False)
    if found["overrides"]:
        words = " ".join(f"--config.{key}={value}" for key, value in found["overrides"].items())
        return f"by an estimate it does not with {words}"
    return "nothing that was tried takes less; shorten data.max_length, take a smaller model, or more devices"
