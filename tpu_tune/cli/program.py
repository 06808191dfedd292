"""The `tpu-tune` program: its parser, and `run`, which runs one command and turns a user's mistake into one line.

Configuration keys are given as in absl and ml_collections: `--config FILE.py`, then `--config.train.learning_rate=1e-4`
for single keys; lists and patterns also as JSON text.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from tpu_tune import __version__
from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.cli import chat, curves, data, eval, export, generate, inspect, lr_find, plan, push, serve, train
from tpu_tune.cli.common import Commands, Parser
from tpu_tune.cli.hf import command as hf
from tpu_tune.errors import UserError

COMMANDS = (
    train,
    lr_find,
    hf,
    plan,
    curves,
    data,
    generate,
    chat,
    serve,
    eval,
    export,
    push,
    inspect,
)  # in the order of the help


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a user's mistake, 2 for a wrong command line.

    Raises:
      KeyboardInterrupt: `ctrl_c.run` handles it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("tpu_tune").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is missing on purpose
    options = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _print_error(str(error))
    except BrokenPipeError:  # the reader, e.g. `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None and error.errno in storage.FULL:  # what is printed goes to a file of a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _print_error(f"what this command prints cannot be written: {error.strerror}")
        if error.filename is None or error.strerror is None:
            raise
        return _print_error(f"{os.fsdecode(error.filename)[:200]}: {error.strerror}")
    except MemoryError as error:
        return _print_error(
            f"this machine ran out of memory ({str(error)[:200] or 'MemoryError'}). Lower "
            "train.per_device_train_batch_size, data.max_length or lora.rank, whichever is large"
        )
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _print_error(
            f"the device ran out of memory ({str(error).splitlines()[0][:200]}). Lower "
            "train.per_device_train_batch_size (and raise train.gradient_accumulation_steps as much) or "
            "data.max_length or lora.rank, or set model.remat=full or quantize.format=nf4"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line; exit with status 2 and a message if it is wrong.

    Besides the command's own options the result has `run` (the command's function), `overrides` (pairs of a config key
    and its text, from `--config.KEY=VALUE`) and, for a command that reads the rest of its line by itself, `rest`.
    """
    parser = make_parser()
    plain, overrides = _split_overrides(parser, arguments)
    options, unknown = parser.parse_known_args(plain)
    if "rest" in options:
        options.rest, unknown = unknown, []
    if unknown:
        key = unknown[0].removeprefix("--").partition("=")[0]
        known = key in dict(configuration.flatten(configuration.default()))
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}"
            + (f"; a config key is written --config.{key}" if known else "")
        )
    if overrides and "config" not in options:
        parser.error(f"{options.command} reads no config, so --config.{overrides[0][0]} has no effect on it")
    options.overrides = overrides
    return options


def make_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = Parser(
        prog="tpu-tune",
        description="Fine-tune an open language model with JAX on a TPU, a GPU or a CPU.",
        epilog="tpu-tune COMMAND --help shows a command's options and an example.",
    )
    parser.add_argument("--version", action="version", version=f"tpu-tune {__version__}")
    commands = Commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    for module in COMMANDS:
        module.add(commands)
    return parser


def _split_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return a command line without `--config.KEY=VALUE` and `--config.KEY VALUE`, and these keys with their values."""
    plain, overrides, remaining = [], [], list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            plain.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals and not remaining:
            parser.error(f"--config.{key} needs a value")
        overrides.append((key, value if equals else remaining.pop(0)))
    return plain, overrides


def _print_error(text: str) -> int:
    print(f"tpu-tune: {' '.join(text.split())}", file=sys.stderr)
    return 1
