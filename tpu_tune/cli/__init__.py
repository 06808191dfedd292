"""`tpu-tune`: one command per job, in a module each, which parses, calls one function and prints.

Configuration keys are given as absl and ml_collections users know them: `--config FILE.py`, then
`--config.train.learning_rate=1e-4` for single keys; lists and patterns also as JSON text.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from tpu_tune import __version__
from tpu_tune import config as configuration
from tpu_tune.cli import curves, data, eval, export, generate, hf, inspect, lr_find, plan, push, train
from tpu_tune.cli.common import Commands
from tpu_tune.errors import UserError

COMMANDS = (train, lr_find, hf, plan, curves, data, generate, eval, export, push, inspect)  # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a user's mistake, 2 for a wrong command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("tpu_tune").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is as it should be
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, overrides = _parser(), []
    plain = []
    while arguments:
        word = arguments.pop(0)
        if word.startswith("--config."):
            key, equals, value = word[len("--config.") :].partition("=")
            if not equals:
                if not arguments:
                    parser.error(f"--config.{key} needs a value")
                value = arguments.pop(0)
            overrides.append((key, value))
        else:
            plain.append(word)
    options, unknown = parser.parse_known_args(plain)
    if "rest" in options:  # a command that reads the rest of its line by itself
        options.rest, unknown = unknown, []
    if unknown:
        key = unknown[0].removeprefix("--").partition("=")[0]
        known = key in dict(configuration.flatten(configuration.default()))
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}"
            + (f"; a config key is written --config.{key}" if known else "")
        )
    if overrides and "config" not in options:
        parser.error(f"{options.command} has no config, so --config.{overrides[0][0]} means nothing to it")
    options.overrides = overrides
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _complain(
            f"the device's memory does not suffice ({str(error).splitlines()[0][:200]}). Lower "
            "train.per_device_train_batch_size (and raise train.gradient_accumulation_steps as much) or data.max_length, "
            "set model.remat=full, or quantize.format=nf4"
        )


def _complain(text: str) -> int:
    print(f"tpu-tune: {' '.join(text.split())}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpu-tune",
        description="Fine-tune an open language model with JAX on a TPU, a GPU or a CPU.",
        epilog="tpu-tune COMMAND --help shows a command's options and an example.",
    )
    parser.add_argument("--version", action="version", version=f"tpu-tune {__version__}")
    commands = Commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    for module in COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
