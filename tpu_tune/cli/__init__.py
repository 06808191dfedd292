"""`tpu-tune`: one command per job, each in a module that parses options, calls one function and prints the result.

`program` holds the parser and runs a command; `common` holds what the commands share. `main` imports them when Ctrl-C
is taken care of: the imports take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tpu_tune import ctrl_c

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: the words after `tpu-tune`; None takes the process's own, which ends with the command.

    Returns:
      The exit status: 0, 1 for a user's mistake, 2 for a wrong command line, 130 after Ctrl-C.
    """

    def load() -> Callable[[], int]:
        from tpu_tune.cli import program

        return lambda: program.run(argv)

    return ctrl_c.run(load, restore=argv is not None)
