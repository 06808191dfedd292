"""The progress line of a run on stderr: a bar in a terminal, a plain line now and then elsewhere.

Time left comes from the updates after the first of this start, so that compiling does not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


def duration(seconds: float) -> str:
    """Seconds in a reader's words: 42s, 3m20s, 2h05m."""
    whole = int(round(max(0.0, seconds)))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Shows how far a run is. Use as a context manager, or call `close`.

    Args:
      total: updates in the whole run.
      initial: updates already made before this start.
      every: updates between plain lines where stderr is no terminal.
      show: False shows nothing (every process but the first).
      stream: where to write; stderr by default.
      clock: seconds; for tests.
      name: what is counted; "train" counts steps.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        every: int = 10,
        show: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        name: str = "train",
    ):
        self._label = "step" if name == "train" else f"{name} row"
        self._stream = stream or sys.stderr
        self._total, self._every, self._show, self._clock = total, max(1, every), show, clock
        self._first: tuple[int, float] | None = None  # (step, time) of the first update of this start
        self._loss: float | None = None
        self._rate: float | None = None
        self._bar = None
        if show and self._stream.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
            self._bar = tqdm(
                total=total, initial=initial, file=self._stream, bar_format=form, desc=name, dynamic_ncols=True
            )

    def update(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Say that `step` updates are made; the last given loss and rate (tokens a second) stay on show."""
        if not self._show:
            return
        self._loss = self._loss if loss is None else float(loss)
        self._rate = self._rate if tokens_per_second is None else float(tokens_per_second)
        now = self._clock()
        self._first = self._first or (step, now)
        if self._bar is not None:
            self._bar.set_postfix_str(self._words(step, now), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._every == 0 or step == self._total or self._first[0] == step:
            self._stream.write(f"{self._label} {step}/{self._total}  {self._words(step, now)}\n")
            self._stream.flush()

    def write(self, line: str) -> None:
        """Print one line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._show:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _words(self, step: int, now: float) -> str:
        words = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        if self._rate is not None:
            words.append(f"{self._rate:,.0f} tokens/s")
        first_step, first_time = self._first
        if step >= self._total:
            words.append("done")
        elif step > first_step:
            words.append(duration((now - first_time) / (step - first_step) * (self._total - step)) + " left")
        return "  ".join(words)
