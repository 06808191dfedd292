"""`tpu-tune data`: one command per step from a folder of anything to a clean, diverse, tokenized set."""

from __future__ import annotations

from tpu_tune.cli.common import Commands
from tpu_tune.cli.data import chunk, clean, cluster, ingest, look, run, split, stats, tokenize

# The modules of this package that add a command, in the order of the help.
COMMANDS = (run, ingest, clean, cluster, split, chunk, tokenize, stats, look)


def add(commands: Commands) -> None:
    """Add `data` and its own commands to the parser."""
    parser = commands.subparsers.add_parser(
        "data",
        help="prepare data: ingest, clean, cluster, split, tokenize, look",
        description="Prepare data, one command per step; `data run` chains them.",
        epilog="tpu-tune data COMMAND --help shows a command's options and an example.",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(Commands(steps, "data "))
