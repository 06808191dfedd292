"""SIGTERM, Ctrl-C and `train.max_hours` as a question that the loop asks between steps.

A TPU may be taken away at any time, and a free session ends at its hour.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from tpu_tune import ctrl_c


def time_limit(hours: float, began: float, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Return the question whether so many hours have passed since `began`, in seconds of the clock; 0 hours: never."""
    return lambda: bool(hours) and clock() - began >= hours * 3600


@contextlib.contextmanager
def catch_signals(is_over: Callable[[], bool] = lambda: False) -> Iterator[Callable[[int], int]]:
    """Yield a function that says after a step which signal has come to stop it, SIGTERM or SIGINT; 0 for none.

    It is asked once a step. That `is_over` holds counts as a SIGTERM, which of several processes the first one sends
    itself. Nothing is raised where the signal lands, which may be a callback that would drop it. A second SIGINT ends
    the program at once; in a notebook it is a KeyboardInterrupt. With several processes one's signal stops all of them
    after the same step.
    """
    came: list[int] = []
    if jax.process_count() > 1:
        yield from _catch_preemption(is_over)
        return

    def reached(step: int) -> int:
        if not came and is_over():
            came.append(signal.SIGTERM)
            print("\ntrain.max_hours are over: saving after this step", file=sys.stderr, flush=True)
        return came[0] if came else 0

    if threading.current_thread() is not threading.main_thread():
        yield reached  # signals belong to the main thread
        return

    def handle(number: int, _: object) -> None:
        if came and number == signal.SIGINT:
            ctrl_c.leave()
        came.append(number)
        print(f"\n{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
        ctrl_c.heard()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield reached
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _catch_preemption(is_over: Callable[[], bool]) -> Iterator[Callable[[int], int]]:
    # jax's coordination service handles SIGTERM itself, and picks the step that all processes can still stop at.
    before = signal.signal(signal.SIGINT, lambda *_: (ctrl_c.heard(), os.kill(os.getpid(), signal.SIGTERM)))

    sent: list[int] = []

    def reached(step: int) -> int:
        if jax.process_index() == 0 and not sent and is_over():
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        if not multihost_utils.reached_preemption_sync_point(step):
            return 0
        print("\nSIGTERM to one of the hosts: saving after this step", file=sys.stderr, flush=True)
        return signal.SIGTERM

    try:
        yield reached
    finally:
        signal.signal(signal.SIGINT, before)
