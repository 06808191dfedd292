"""Ctrl-C in the program `tpu-tune`, wherever it lands. Only the standard library: it is set before the imports.

Python raises KeyboardInterrupt at the line where the signal lands. In a callback of the garbage collector (jax has
one), a `__del__` or a callback from C++ the exception is printed and dropped, and the command goes on. So it is raised
again, by a timer, until the program has ended or is cleaning up. It is not raised while an extension module is being
loaded, which may crash of it, nor in jax's search for plugins, which prints whatever ends a plugin's start and goes on:
these come to their end first. The program's own imports, with nothing to clean up yet, end
at once. A second Ctrl-C ends the process without raising anything. Training has a handler of its own while it makes
steps: `tpu_tune.training.interrupt`.

Python runs a handler in the main thread between two of its instructions, so never while that thread compiles a step,
which may take minutes. A thread therefore watches the file that Python's own C handler writes to: it says what is
waited for, and ends the process at a second Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

STATUS = 130  # of a program that Ctrl-C has ended
_FIRST, _EVERY = 0.05, 0.25  # seconds until an exception that was dropped is raised again
_PATIENCE = 1.0  # seconds until a Ctrl-C that no handler has heard of is answered all the same
_FAREWELL = 3.0  # seconds that `before_leaving` may take


class _Program:
    """The command that runs under our handlers."""

    def __init__(self) -> None:
        self.loading = False
        self.came = False
        self.ended = False
        self.status = STATUS
        self.heard = threading.Event()  # a handler has run
        self._wakeup = -1
        self._wakeup_before = -1
        self._hook = sys.unraisablehook
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Set the handlers."""
        for number, handler in ((signal.SIGINT, self._interrupt), (signal.SIGALRM, self._again)):
            self._before[number] = signal.signal(number, handler)
        sys.unraisablehook = self._report
        reader, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="ctrl-c").start()

    def _watch(self, reader: int) -> None:
        """Answer the Ctrl-C that the main thread cannot hear, until the program has ended."""
        count = 0
        while number := os.read(reader, 1):
            if number[0] != signal.SIGINT or self.ended:
                continue
            count += 1
            if count > 1:
                leave()
            threading.Thread(target=self._answer, daemon=True).start()
        os.close(reader)

    def _answer(self) -> None:
        if not self.heard.wait(_PATIENCE) and not self.ended:
            what = "interrupted: it ends after what is being compiled or loaded; Ctrl-C again ends it at once"
            os.write(2, f"\ntpu-tune: {what}\n".encode())

    def end(self, restore: bool) -> None:
        """Raise nothing from here on; put the handlers back that were there, if there is anything after this."""
        self.ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._wakeup >= 0:  # else it was interrupted before it was there
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup)  # which ends the thread that reads its other end
        if restore:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            sys.unraisablehook = self._hook

    def _interrupt(self, number: int, frame: Any) -> None:
        self.heard.set()
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
        if self.came and not self.ended and not _is_handled() and not _comes_to_its_end(frame):
            raise KeyboardInterrupt

    def _report(self, problem: Any) -> None:
        if not (self.came and issubclass(problem.exc_type, KeyboardInterrupt)):
            self._hook(problem)


_program: _Program | None = None
_leaving = threading.Lock()
_farewells: list[Callable[[], Any]] = []


def _forget() -> None:
    """Stop telling the program of signals: those of a forked worker are not its own."""
    if _program is not None and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


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
        try:
            return load()()
        except KeyboardInterrupt:
            return _interrupted()
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
    return _interrupted()


def _interrupted() -> int:
    print("tpu-tune: interrupted", file=sys.stderr, flush=True)
    return STATUS


def leave(why: str = "interrupted twice, ending at once") -> NoReturn:
    """End at once what is interrupted a second time; files are written so that they survive it.

    Raises:
      KeyboardInterrupt: the process is not ours to end, such as a notebook's.
    """
    if _program is None:
        raise KeyboardInterrupt
    if not _leaving.acquire(blocking=False):
        time.sleep(2 * _FAREWELL)  # the other thread is leaving
    last = threading.Thread(target=_say_farewell, daemon=True)
    last.start()
    last.join(_FAREWELL)
    os.write(2, f"tpu-tune: {why}\n".encode())
    os._exit(STATUS)


def heard() -> None:
    """Tell that a handler of one's own has heard of a Ctrl-C."""
    if _program is not None:
        _program.heard.set()


@contextlib.contextmanager
def before_leaving(act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` where the block is ended by a second Ctrl-C, from whichever thread; what it raises is dropped."""
    _farewells.append(act)
    try:
        yield
    finally:
        _farewells.remove(act)


def _say_farewell() -> None:
    for act in reversed(_farewells):
        with contextlib.suppress(Exception):
            act()


def _is_handled() -> bool:
    """Whether the main thread is in a `finally`, `except` or `with` that a KeyboardInterrupt passes through."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _comes_to_its_end(frame: Any) -> bool:
    """Whether a frame is part of an extension module's own start, or of jax's search for plugins."""
    while frame is not None:
        if frame.f_code.co_qualname.startswith(("ExtensionFileLoader.", "discover_pjrt_plugins")):
            return True
        frame = frame.f_back
    return False
