"""What the commands share: adding one to the parser, reading its configuration, and where its output goes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpu_tune import config as configuration

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """argparse's parser, to which the beginning of one option's two spellings is not ambiguous (`spellings`).

    So have it later Pythons: `--skip` is `--skip-bad` and `--skip_bad`, which are one option.
    """

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        first: dict[int, Any] = {}
        for found in super()._get_option_tuples(option_string):
            first.setdefault(id(found[0]), found)
        return list(first.values())


@dataclass(frozen=True)
class Commands:
    """The commands of one parser; those of `data` are a `Commands` of their own.

    Attributes:
      subparsers: argparse's subparsers.
      prefix: what precedes the commands' names on the command line, "" or "data ".
    """

    subparsers: Any
    prefix: str = ""

    def add(
        self, name: str, run: Callable[[argparse.Namespace], int], help: str, example: str
    ) -> argparse.ArgumentParser:
        """Add a command; every command has an example in its help and the option --json.

        Args:
          run: runs the command; returns the exit status.
          help: one line in lower case without a full stop.
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
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        return added


def spellings(option: str) -> list[str]:
    """Return an option as we spell it, `--split-ratio`, and as the guide spells it, `--split_ratio`."""
    return [option, "--" + option[2:].replace("-", "_")]


def add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add `--config FILE` to a command; `read_config` reads it."""
    parser.add_argument(
        "--config", required=required, metavar="FILE", help="config file; --config.KEY=VALUE overrides a key"
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add `--step`, which chooses a checkpoint of a run."""
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="take the run's checkpoint of step N, or its last or best one (--step last, --step best; best is the "
        "lowest eval_loss); default: what the run ended with, or where it has not ended, the last checkpoint (the best "
        "under train.load_best_model_at_end)",
    )


def _step(text: str) -> int | str:
    if text in ("last", "best"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is neither a step nor last nor best")
    return int(text)


def read_config(options: argparse.Namespace) -> Any:
    """Return the configuration of `--config FILE`, or the default one, with each `--config.KEY=VALUE` applied."""
    config = configuration.from_file(options.config) if options.config else configuration.default()
    for key, value in options.overrides:
        configuration.assign(config, key, value)
    return configuration.check(config)


def say(line: str) -> None:
    """Print a line about the progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def stdout_for_json(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which, with --json, everything printed goes to standard error: stdout holds JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def join_hosts() -> None:
    """Connect to the other hosts of a pod, if there are any; must come before anything asks jax for its devices."""
    from tpu_tune.training import distributed

    with distributed.leaving_alone():
        distributed.join()
