"""One start at a time in a run directory: `run.lock` says which process trains there, on a disk or in a bucket.

The lock holds the host, the process and when it began, so that one which a killed process has left is told from one
that is held: on the same machine by asking for the process, else by waiting whether the lock is renewed, which its
holder does all the time. No clocks are compared. A lock that was left is taken over, which is said aloud; a process
that was stopped for so long that another took over learns it before it writes again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_directory import RunDirectory, one_line_error
from tpu_tune.errors import UserError

log = logging.getLogger(__name__)

NAME = "run.lock"
RENEWAL = 20.0  # seconds between renewals
PATIENCE = 3  # renewals that may fail to come before a lock of another machine counts as left
_SETTLE = 2.0  # seconds after which a bucket shows who of two that wrote at the same time was the last


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
      host: the machine's name.
      machine: tells boots of a machine apart, and containers on it; process numbers mean something within one.
      process: its number.
      began: when the process began, by the machine's own count; a number that is used again has another.
      token: of this start.
      since: when the lock was taken, as text for people.
      renewals: how often it was renewed.
    """

    host: str
    machine: str
    process: int
    began: str
    token: str
    since: str
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since})"


class RunLock:
    """A lock that this process holds.

    Args:
      file: its path.
      holder: this process.
      seconds: time between renewals.
    """

    def __init__(self, file: str, holder: Holder, seconds: float):
        self._file, self._holder, self._seconds = file, holder, seconds
        self._thief: Holder | None = None
        self._renewed = time.monotonic()
        self._busy, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="run lock")
        self._thread.start()

    def check(self) -> None:
        """Make sure that the directory is still this process's, before something is written to it.

        Raises:
          UserError: another process has taken over.
        """
        if time.monotonic() - self._renewed > (PATIENCE - 1) * self._seconds:
            self._renew()  # this process was stopped for a while
        if self._thief is not None:
            raise UserError(
                f"{os.path.dirname(self._file)} was taken over by {self._thief} while this process was not running; "
                "it goes on there, and this one ends"
            )

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken over: what is in the directory is no longer this process's to change."""
        return self._thief is not None

    def release(self) -> None:
        """Give the lock back, unless it is another's by now."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            found = _parse(_read(self._file))
            if found is not None and found.token == self._holder.token:
                storage.remove(self._file)

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds):
            self._renew()

    def _renew(self) -> None:
        with self._busy, contextlib.suppress(OSError):  # a full disk or a lost bucket is told by whoever writes
            text = _read(self._file)
            found = _parse(text)
            if found is not None and found.token != self._holder.token:
                self._thief = found
                return
            renewed = dataclasses.replace(self._holder, renewals=self._holder.renewals + 1)
            if _write(self._file, text, _text(renewed)):
                self._holder, self._renewed = renewed, time.monotonic()


@contextlib.contextmanager
def hold(run: RunDirectory, say: Callable[[str], None], seconds: float = RENEWAL) -> Iterator[RunLock]:
    """Hold the lock of a run directory, which is made if needed, and removed again if nothing was written to it.

    Args:
      run: the run directory.
      say: receives a line where a lock that was left is taken over, or waited for.
      seconds: time between renewals.

    Raises:
      UserError: another process trains there, or the lock cannot be written.
    """
    file, made = run.file(NAME), not storage.exists(run.path)
    try:
        storage.make_dirs(run.path)
        text = _read(file)
        _pass(run, text, say, seconds)
        mine = _this_process()
        won = _write(file, text, _text(mine))
        if won and storage.is_remote(file):
            time.sleep(_SETTLE)
            won = _parse(_read(file)) == mine
    except OSError as error:
        raise UserError(f"output_dir {run.path} cannot be made or written: {error.strerror or error}") from error
    if not won:
        raise _in_use(run, _parse(_read(file)))
    lock = RunLock(file, mine, seconds)
    try:
        yield lock
    finally:
        lock.release()
        if made and not storage.is_remote(run.path):
            with contextlib.suppress(OSError):  # it has something in it, as it should
                os.rmdir(run.path)


def refuse_second(run: RunDirectory) -> None:
    """Raise where a process of this machine holds the lock, before anything is loaded.

    Raises:
      UserError: it does.
    """
    with one_line_error(run.file(NAME)):
        holder = _parse(_read(run.file(NAME)))
    if holder is not None and _is_here(holder) and _is_alive(holder):
        raise _in_use(run, holder)


def _pass(run: RunDirectory, text: str, say: Callable[[str], None], seconds: float) -> None:
    """Raise where a lock is held; say that it was left where it was."""
    holder = _parse(text)
    if holder is None:
        return
    if _is_here(holder):
        if _is_alive(holder):
            raise _in_use(run, holder)
    else:
        wait = PATIENCE * seconds
        say(f"{run.path} has a lock of {holder}; waiting up to {wait:.0f} s whether it is still held")
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / 4))
            if _read(run.file(NAME)) != text:
                raise _in_use(run, _parse(_read(run.file(NAME))) or holder)
    say(f"{run.path}: its lock was left by {holder}, which has ended without giving it back; taking over")


def _in_use(run: RunDirectory, holder: Holder | None) -> UserError:
    who = "another process" if holder is None else str(holder)
    return UserError(f"output_dir {run.path} is in use: {who} trains there; let it end, or choose another output_dir")


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        process=os.getpid(),
        began=_began(os.getpid()),
        token=secrets.token_hex(8),
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _machine() -> str:
    """This boot of this machine, and the namespace of its process numbers; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a process began; "" where it has ended, also where nobody has asked for its status, or nothing is known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_here(holder: Holder) -> bool:
    return (holder.host, holder.machine) == (socket.gethostname(), _machine())


def _is_alive(holder: Holder) -> bool:
    if holder.machine:
        return holder.began != "" and _began(holder.process) == holder.began
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder)) + "\n"


def _parse(text: str) -> Holder | None:
    """The holder; None where there is none, or what a kill has cut off while it was written."""
    try:
        values = json.loads(text)
        holder = Holder(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    types = {field.name: int if field.name in ("process", "renewals") else str for field in dataclasses.fields(Holder)}
    return holder if all(type(values.get(name, 0)) is kind for name, kind in types.items()) else None


def _read(file: str) -> str:
    """The content of a lock; "" where there is none."""
    try:
        if storage.is_remote(file):
            return storage.read_bytes(file).decode(errors="replace")
        with open(file, encoding="utf-8", errors="replace") as stream, _alone(stream.fileno()):
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _write(file: str, before: str, after: str) -> bool:
    """Replace the content of a lock; return False where it is no longer what it was. A bucket cannot tell."""
    if storage.is_remote(file):
        storage.write_bytes(file, after.encode())
        return True
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8", errors="replace") as stream:
        with _alone(stream.fileno()):
            gone = not os.path.exists(file) or os.stat(file).st_ino != os.fstat(stream.fileno()).st_ino
            if gone or stream.read() != before:
                return False
            stream.seek(0)
            stream.write(after)
            stream.truncate()  # afterwards: nobody may read an empty one where there is no flock
    return True


@contextlib.contextmanager
def _alone(descriptor: int) -> Iterator[None]:
    """Read and write a local file with nobody else in it; a kill ends this."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:  # a file system without such locks
        log.debug("no flock: %s", error)
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
