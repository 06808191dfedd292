"""`tpu-tune train`: check the memory of this machine's devices, train, and print where the results are."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from tpu_tune.cli.common import Commands, add_config, join_hosts, read_config, stdout_for_json
from tpu_tune.cli.memory_check import as_planned, check_memory


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "train",
        run,
        "train a model, or continue the run in output_dir",
        "tpu-tune train --config configs/qlora.py --config.model.path=DIR --config.data.train=chats.jsonl",
    )
    add_config(parser, required=True)
    parser.add_argument("--no-check", action="store_true", help="start without checking first whether the job fits")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    config = read_config(options)
    join_hosts()
    config, facts = as_planned(config, check_memory(config, ask_compiler=not options.no_check))
    return start(config, options.json, facts)


def start(config: Any, as_json: bool, facts: dict[str, Any] | None = None) -> int:
    """Train, after `join_hosts`, and print where the results are; return the exit status.

    It is 0 where the run has ended, and a shell's 128 + the signal where SIGINT (130) or SIGTERM (143) has stopped it.
    """
    import tpu_tune
    from tpu_tune.checkpoints import storage
    from tpu_tune.training import distributed

    with stdout_for_json(as_json), distributed.leaving_alone():
        run = tpu_tune.train(config, facts)
    if as_json:
        result = {"status": run.status, "step": run.step, "output_dir": run.output_dir, "result": run.result_dir}
        print(json.dumps(result))
    elif run.status == "interrupted":
        print(
            f"what it has learned so far can be used: tpu-tune generate --model {run.output_dir}; so do eval and export"
        )
    else:
        metrics, curves = (os.path.join(run.output_dir, name) for name in ("metrics.jsonl", "curves.png"))
        print(f"metrics: {metrics}" + (f"; curves: {curves}" if storage.exists(curves) else ""))
    return 128 + run.signal if run.signal else 0
