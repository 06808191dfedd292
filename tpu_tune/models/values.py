"""What values a file that others wrote may hold: `check` holds a mapping against a table of kinds, in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tpu_tune.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_WHAT_CODE_RAISES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of value.

    Attributes:
      words: what it is, for messages: "a whole number from 1 to 8".
      holds: whether a value is of it.
    """

    words: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        """Either of the two."""
        return Kind(f"{self.words} or {other.words}", lambda value: self.holds(value) or other.holds(value))


def whole(least: int, most: int) -> Kind:
    """Whole numbers from `least` to `most`."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Kind(f"a whole number from {least:,} to {most:,}", holds)


def number(least: float = -math.inf, most: float = math.inf, above: bool = False) -> Kind:
    """Finite numbers from `least` to `most`; `above`: greater than `least`."""

    def holds(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return abs(value) <= 1e300 and least <= value <= most and not (above and value == least)

    lower = "" if least == -math.inf else f" above {least:g}" if above else f" of at least {least:g}"
    upper = "" if most == math.inf else f"{' and' if lower else ''} at most {most:g}"
    return Kind(f"a finite number{lower}{upper}", holds)


def listing(of: Kind) -> Kind:
    """Lists of values of one kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(of.holds, value))

    return Kind(f"a list whose every entry is {of.words}", holds)


def mapping(of: Kind) -> Kind:
    """Objects whose every value is of one kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(TEXT.holds, value)) and all(map(of.holds, value.values()))

    return Kind(f"an object whose every value is {of.words}", holds)


def one_of(*texts: str) -> Kind:
    """One of some texts."""
    return Kind(f"one of {', '.join(texts)}", lambda value: isinstance(value, str) and value in texts)


NOTHING = Kind("null", lambda value: value is None)
ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))


def check(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Hold the values of a mapping against kinds; keys that are not there, and other keys, are of no concern.

    Args:
      values: what was read.
      kinds: key -> kind.
      where: what the message begins with: the file, and what of it.

    Raises:
      UserError: a value is of another kind; the first is named.
    """
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            raise UserError(f"{where}: '{key}' is {shown(values[key])}; it must be {kind.words}")


def shown(value: Any) -> str:
    """A value in a few characters, on one line."""
    return " ".join(_SHORT.repr(value).split())[:100]


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn what Python raises over a value that it cannot work with into one line.

    Args:
      what: the file, and what of it cannot be used.

    Raises:
      UserError: in place of the many.
    """
    try:
        yield
    except _WHAT_CODE_RAISES as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: a value of a wrong type or range ({type(error).__name__}: {reason})") from error
