"""Ctrl-C in the program `tpu-tune`, wherever it lands. Only the standard library: it is set before the imports.

Python raises KeyboardInterrupt at the line where the signal lands. In a callback of the garbage collector (jax has
one), a `__del__` or a callback from C++ the exception is printed and dropped, and the command goes on. So it is raised
again, by a timer, until the program has ended or is cleaning up. It is not raised while an extension module is being
loaded, which may crash of it: that comes to its end first. The program's own imports, with nothing to clean up yet, end
at once. A second Ctrl-C ends the process without raising anything. Training has a handler of its own while it makes
steps: `tpu_tune.training.interrupt`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

STATUS = 130  # of a program that Ctrl-C has ended
_FIRST, _EVERY = 0.05, 0.25  # seconds until an exception that was dropped is raised again


class _Program:
    """The command that runs under our handlers."""

    def __init__(self) -> None:
        self.loading = False
        self.came = False
        self.ended = False
        self.status = STATUS
        self._hook = sys.unraisablehook
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Set the handlers."""
        for number, handler in ((signal.SIGINT, self._interrupt), (signal.SIGALRM, self._again)):
            self._before[number] = signal.signal(number, handler)
        sys.unraisablehook = self._report

    def end(self, restore: bool) -> None:
        """Raise nothing from here on; put the handlers back that were there, if there is anything after this."""
        self.ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        if restore:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            sys.unraisablehook = self._hook

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.loading:
            leave("interrupted")
        if self.ended:
            os._exit(self.status)
        if self.came:
            leave()
        self.came = True
        signal.setitimer(signal.ITIMER_REAL, _FIRST, _EVERY)
        self._again(number, frame)

    def _again(self, number: int, frame: Any) -> None:
        if self.came and not self.ended and not _is_handled() and not _loads_extension(frame):
            raise KeyboardInterrupt

    def _report(self, problem: Any) -> None:
        if not (self.came and issubclass(problem.exc_type, KeyboardInterrupt)):
            self._hook(problem)


_program: _Program | None = None


def run(load: Callable[[], Callable[[], int]], restore: bool) -> int:
    """Return the exit status of a command: its own, or 130 and a line where Ctrl-C has ended it.

    Args:
      load: imports what the program needs, and returns the command, whose result is its exit status.
      restore: whether the process goes on afterwards, as in a test; else Ctrl-C while Python shuts down is no
        traceback either.
    """
    global _program
    is_main_thread = threading.current_thread() is threading.main_thread()
    # A process in the background may have been started with Ctrl-C ignored, and a notebook has its own handler.
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return load()()
    program = _program = _Program()
    try:
        program.loading = not restore
        program.install()
        command = load()
        program.loading = False
        program.status = command()
    except KeyboardInterrupt:
        program.came = True
    except Exception:
        if not program.came:  # else it was dropped in a callback, whose failure is this one
            raise
    finally:
        program.end(restore)
        _program = None if restore else program
    if not program.came or program.status not in (0, STATUS):  # the command has failed by itself, and has said so
        return program.status
    program.status = STATUS
    print("tpu-tune: interrupted", file=sys.stderr, flush=True)
    return STATUS


def leave(why: str = "interrupted twice, ending at once") -> NoReturn:
    """End at once what is interrupted a second time; files are written so that they survive it.

    Raises:
      KeyboardInterrupt: the process is not ours to end, such as a notebook's.
    """
    if _program is None:
        raise KeyboardInterrupt
    os.write(2, f"tpu-tune: {why}\n".encode())
    os._exit(STATUS)


def _is_handled() -> bool:
    """Whether the main thread is in a `finally`, `except` or `with` that a KeyboardInterrupt passes through."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _loads_extension(frame: Any) -> bool:
    """Whether a frame is part of an extension module's own start."""
    while frame is not None:
        if frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
            return True
        frame = frame.f_back
    return False
