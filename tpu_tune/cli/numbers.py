"""Types of the options that are numbers: every one is finite and within bounds that its command can work with.

An option outside them ends the command before it starts, with the option's name and the bounds.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from tpu_tune.config.engine import Bounds


def whole(at_least: int = 0, at_most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return argparse's `type` of a whole number; by default what an array of int32 can count."""
    return functools.partial(_read, int, "a whole number", Bounds(at_least=at_least, at_most=at_most))


def real(**bounds: float) -> Callable[[str], float]:
    """Return argparse's `type` of a finite number within `config.engine.Bounds`."""
    return functools.partial(_read, float, "a number", Bounds(**bounds))


def _read(kind: type, called: str, bounds: Bounds, text: str) -> int | float:
    try:
        number = kind(text)
    except ValueError:  # also of a whole number with more digits than Python reads
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not {called}") from None
    if reason := bounds.broken(number):
        raise argparse.ArgumentTypeError(f"{text[:40]} is out of range; it must be {reason}")
    return number


seed = whole(0, 2**32 - 1)  # what NumPy, scikit-learn and JAX all take
