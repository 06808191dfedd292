"""The text of an answer whose tokens come little by little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Pieces:
    """Turns tokens into pieces of text, whose sum is the text of them all, up to and without a text that stops it.

    Held back is half of a character, and what may be the beginning of a stop.

    Args:
      tokenizer: whose tokens they are.
      stops: texts that end the answer.

    Attributes:
      ids: the tokens so far.
      stopped: whether one of the stops has come; nothing is added then.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer, self._stops, self._shown = tokenizer, stops, ""

    @property
    def length(self) -> int:
        """Characters of all the pieces so far."""
        return len(self._shown)

    def add(self, ids: Sequence[int]) -> str:
        """Add tokens; return the piece that is certain now, which may be empty."""
        self.ids += ids
        text = self._text()
        if self.stopped:
            return self._show(text)
        if not text.startswith(self._shown) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._show(text[: len(text) - self._held(text)])

    def rest(self) -> str:
        """Return the last piece: what was held back."""
        return "" if self.stopped else self._show(self._text())

    def _text(self) -> str:
        """All tokens' text, up to the first stop."""
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _held(self, text: str) -> int:
        """How many of the last characters may begin a stop."""
        lengths = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)

    def _show(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], text
        return piece
