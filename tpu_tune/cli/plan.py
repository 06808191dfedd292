"""`tpu-tune plan`: find out whether a job fits a device."""

from __future__ import annotations

import argparse
import json

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, add_config, read_config, say


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "plan",
        run,
        "compute whether a job fits a device, its memory and its time; needs neither the weights nor the device",
        "tpu-tune plan --config configs/qlora.py --config.model.path=llama-7b --device v5e-1",
    )
    add_config(parser)
    parser.add_argument(
        "--device",
        required=True,
        nargs="+",
        metavar="NAME",
        help="a TPU slice (v2-8, v3-8, v4-8, v5e-1, v5e-4, v5e-8, v5e-64, v6e-1, v6e-8, v5p-8) or a GPU (t4, l4, "
        "rtx3090, rtx4080, rtx4090, a100-40g, a100-80g, h100, h200, rtx6000ada-48g); two GPUs: rtx4090 x2",
    )
    parser.add_argument(
        "--suggest", action="store_true", help="find the largest batch that fits, and the settings for it"
    )
    parser.add_argument(
        "--rows",
        type=numbers.whole(),
        metavar="N",
        help="number of training rows, for the run's length (with data.packing, of packed rows)",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="estimate the memory from array sizes alone, in seconds instead of minutes",
    )
    parser.add_argument(
        "--max-compiles",
        type=numbers.whole(1),
        default=8,
        metavar="N",
        help="most compilations that --suggest may make (default 8)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from tpu_tune import planning

    config, device = read_config(options), planning.find_device(" ".join(options.device))
    if not options.suggest:
        figures = planning.plan(config, device, options.rows, not options.no_compile)
        print(json.dumps(figures, indent=2) if options.json else planning.table(figures))
        return 0
    say(f"looking for what fits {device.name}, with at most {options.max_compiles} compiles")
    suggestion = planning.suggest(config, device, options.rows, not options.no_compile, options.max_compiles, say)
    print(json.dumps(suggestion, indent=2) if options.json else planning.advice(suggestion, device))
    return 0
