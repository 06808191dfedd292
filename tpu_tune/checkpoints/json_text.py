"""JSON of files that others wrote: every failure of reading it is one kind of error, with a reason in a few words."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100  # lists and objects inside one another; what walks through a value calls itself as often
MAX_DIGITS = 4300  # Python reads no longer whole number


class BadJson(json.JSONDecodeError):
    """Text that is JSON and still cannot be read; `msg` says why."""

    def __init__(self, reason: str):
        """Keep the reason; there is no one place in the text to point at."""
        super().__init__(reason, "", 0)

    def __str__(self) -> str:
        """The reason alone."""
        return self.msg


def loads(text: str | bytes) -> Any:
    """`json.loads`, which fails in one way only.

    Args:
      text: bytes are UTF-8.

    Raises:
      json.JSONDecodeError: it is no JSON, is nested more than MAX_DEPTH deep, or has a whole number of more than
        MAX_DIGITS digits.
      UnicodeDecodeError: it is not UTF-8. Both are ValueErrors.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise BadJson(f"nested too deeply, more than {MAX_DEPTH} deep") from None
    except ValueError:
        raise BadJson(f"a number of it is too long, more than {MAX_DIGITS:,} digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and is_too_deep(value):
        raise BadJson(f"nested too deeply, more than {MAX_DEPTH} deep")
    return value


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects stand more than MAX_DEPTH deep inside one another."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
