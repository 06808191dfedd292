"""`tpu-tune`: one command per job, each in a module that parses options, calls one function and prints the result.

`program` holds the parser and `main`; `common` holds what the commands share.
"""

from tpu_tune.cli.program import main

__all__ = ["main"]
