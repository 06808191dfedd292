"""What the commands share: how one is added to the parser, and how its configuration is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpu_tune import config as configuration

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Commands:
    """The commands of one parser; those of `data` are a `Commands` of their own.

    Attributes:
      subparsers: argparse's own.
      prefix: what stands before the commands' names on the command line, "" or "data ".
    """

    subparsers: Any
    prefix: str = ""

    def add(
        self, name: str, run: Callable[[argparse.Namespace], int], help: str, example: str
    ) -> argparse.ArgumentParser:
        """Add a command; every command has an example in its help and prints JSON when asked to.

        Args:
          run: what it does; returns the exit status.
          help: one line, in small letters, without a full stop.
          example: a command line that the parser accepts.
        """
        added = self.subparsers.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, overrides=[], command=self.prefix + name)
        added.add_argument("--json", action="store_true", help="print figures as JSON")
        return added


def spellings(option: str) -> list[str]:
    """An option as it is written here, `--split-ratio`, and as the guide writes it, `--split_ratio`."""
    return [option, "--" + option[2:].replace("-", "_")]


def read_config(options: argparse.Namespace) -> Any:
    """The configuration of `--config FILE` with the `--config.KEY=VALUE` laid over it."""
    config = configuration.from_file(options.config) if options.config else configuration.default()
    for key, value in options.overrides:
        configuration.assign(config, key, value)
    return configuration.check(config)
