"""`tpu-tune data split`: train.jsonl and val.jsonl from one file."""

from __future__ import annotations

import argparse
import json
import sys

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, spellings
from tpu_tune.errors import counted


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "split",
        run,
        "write train.jsonl and val.jsonl, seeded, line by line",
        "tpu-tune data split --input dataset.jsonl --split_ratio 0.99,0.01",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", dest="input", metavar="FILE", help="the .jsonl file (or .jsonl.gz) to split")
    source.add_argument("positional", nargs="?", metavar="FILE", help="the same, without --input")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        *spellings("--split-ratio"),
        metavar="TRAIN,VAL",
        help="each row is for training if a number drawn from [0, TRAIN + VAL) is below TRAIN",
    )
    size.add_argument(
        *spellings("--val-count"),
        type=numbers.whole(at_most=2**63 - 1),
        metavar="N",
        help="exactly N rows for validation (with --group-key: at least)",
    )
    size.add_argument(
        "--auto",
        action="store_true",
        help="the guide's rule of thumb, and what is done without any of these three: 0.1%% for validation, 0.01%% "
        "from a million rows on; at least one row",
    )
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        *spellings("--group-key"),
        default="",
        metavar="KEY",
        help="rows with the same value of KEY stay together, such as one conversation's; a.b is b inside a",
    )
    keys.add_argument(
        "--stratify", default="", metavar="KEY", help="the same share of each value of KEY, such as cluster"
    )
    parser.add_argument("--seed", type=numbers.seed, default=42, metavar="N", help="decides which rows (default 42)")
    parser.add_argument(
        *spellings("--output-dir"), default=".", metavar="DIR", help="where to write (default: the working directory)"
    )
    parser.add_argument(*spellings("--skip-bad"), action="store_true", help="leave out and count what cannot be used")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.data.split import SplitOptions, parse_ratio, split_file

    share = None if options.split_ratio is None else parse_ratio(options.split_ratio)
    split_options = SplitOptions(share, options.val_count, options.group_key, options.stratify, options.seed)
    report = split_file(options.input or options.positional, options.output_dir, split_options, options.skip_bad)
    if options.json:
        print(json.dumps(report))
        return 0
    for side in ("train", "val"):
        print(f"{report[side]}: {report[f'{side}_rows']:,} of {counted(report['rows'], 'row')}")
    if report["bad_rows"]:
        print(f"{counted(report['bad_rows'], 'bad row')} left out", file=sys.stderr)
    return 0
