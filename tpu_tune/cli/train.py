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
    parser = commands.add("train", run, "train, or go on with a run that is in output_dir",
                    "tpu-tune train --config configs/qlora.py --config.model.path=DIR --config.data.train=chats.jsonl")  # fmt: skip
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
    import tpu_tune

    if not options.no_check:
        _check_memory(config)

    # With --json standard output holds nothing but JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        with distributed.leaving_alone():
            run = tpu_tune.train(config)
    if options.json:
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


def _check_memory(config: Any) -> None:
    """Plan for the devices of this machine, before anything is downloaded or loaded.

    Raises:
      UserError: the job does not fit; the table is on standard error.
    """
    from tpu_tune import planning

    log = logging.getLogger("tpu_tune")
    checkpoints = os.path.join(config.output_dir, "checkpoints")
    if os.path.isdir(checkpoints) and os.listdir(checkpoints):
        return  # it has run before
    device = planning.device_here()
    if device is None:
        return
    log.info("does it fit %s? (compiling the step beforehand; --no-check leaves it out)", device.name)
    try:
        figures = planning.plan(config, device)
    except UserError:
        return  # training says it better
    except Exception as error:  # a plan that cannot be made is no reason not to train
        log.warning("the memory could not be checked beforehand (%s: %s)", type(error).__name__, error)
        return
    log.info("%s (compiler: %s)", planning.verdict(figures), figures["compiler"])
    if figures["fits"] or figures["compiler"].startswith("none"):
        return
    print(planning.table(figures), file=sys.stderr)
    raise UserError(
        f"this job does not fit {device.name}; tpu-tune plan --suggest --device '{device.name}' with the same --config "
        "looks for one that does, and --no-check trains all the same"
    )
