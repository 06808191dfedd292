"""The one exception for a mistake that the user can mend, and the words for a number in what users are told."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 1; library callers may catch it.

    Args:
      message: the line. What it quotes of a file may have line breaks in it; they become blanks.
    """

    def __init__(self, message: object = ""):
        super().__init__(" ".join(str(message).splitlines()))


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, "1 row" and "2,000 rows"; `plural` is the noun's where an s does not make it."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
