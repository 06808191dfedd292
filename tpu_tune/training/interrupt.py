"""SIGTERM and Ctrl-C as a question that the loop asks between steps: a TPU may be taken away at any time."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM or SIGINT has come; a second SIGINT interrupts at once."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set  # signals belong to the main thread
        return

    def handle(number: int, _: object) -> None:
        if came.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.set()
        print(f"\n{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
