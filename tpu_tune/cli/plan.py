"""`tpu-tune plan`: whether a job fits a device."""

from __future__ import annotations

import argparse
import json
import sys

from tpu_tune.cli.common import Commands, read_config


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "plan",
        run,
        "say whether a job fits a device, and what it takes; needs neither weights nor the device",
        "tpu-tune plan --config configs/qlora.py --config.model.path=llama-7b --device v5e-1",
    )
    parser.add_argument("--config", metavar="FILE", help="config file; --config.KEY=VALUE overrides a key")
    parser.add_argument(
        "--device",
        required=True,
        nargs="+",
        metavar="NAME",
        help="TPU slice (v2-8, v3-8, v4-8, v5e-1, v5e-4, v5e-8, v5e-64, v6e-1, v6e-8, v5p-8) or card (t4, l4, rtx3090, "
        "rtx4080, rtx4090, a100-40g, a100-80g, h100, h200, rtx6000ada-48g), with x2 behind it for two cards",
    )
    parser.add_argument("--suggest", action="store_true", help="look for the largest batch that fits")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="training rows (packed ones, if data.packing), for the run's length"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="count bytes only: seconds instead of minutes, and an estimate"
    )
    parser.add_argument("--max-compiles", type=int, default=8, metavar="N", help="of --suggest (default 8)")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune import planning

    config, device = read_config(options), planning.find_device(" ".join(options.device))
    if not options.suggest:
        figures = planning.plan(config, device, options.rows, not options.no_compile)
        print(json.dumps(figures, indent=2) if options.json else planning.table(figures))
        return 0

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    say(f"looking for what fits {device.name}, with at most {options.max_compiles} compiles")
    found = planning.suggest(config, device, options.rows, not options.no_compile, options.max_compiles, say)
    print(json.dumps(found, indent=2) if options.json else planning.advice(found, device))
    return 0
