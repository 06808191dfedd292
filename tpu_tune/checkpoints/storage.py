"""Files in a bucket beside files on a disk: `gs://bucket/run` where a path may stand.

A path with `scheme://` goes through fsspec, which knows gs:// by gcsfs, s3:// by s3fs and memory:// for tests; anything
else is a local file. What is written appears whole or not at all: `whole_file` and `whole_directory` write beside the
target and rename, or upload. An object appears when its upload is complete; a directory of objects has no rename, so
the file that marks a result as complete is uploaded last. Readers that need a local file take `local_copy`.

Why not `etils.epath`, which Orbax brings: it writes local files in place, so that a kill leaves half of one; it hands
on whatever its clients raise; it switches to TensorFlow's client, with other credentials, where TensorFlow is
installed; and it takes a scheme that it does not know (memory://) for a local path.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tpu_tune.errors import UserError

log = logging.getLogger(__name__)

# A result (an adapter or a model) in a bucket is complete when one of these is there: they are uploaded last.
COMPLETE_MARKERS = ("adapter_config.json", "config.json")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: no room; writing to an open file names none
_BIG_COPY = 100_000_000  # bytes; a larger copy is announced
_EXTRAS = {"gs": "gcs", "gcs": "gcs"}  # scheme -> our extra that brings its package


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names something in a bucket."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(path)))


def absolute(path: str | os.PathLike) -> str:
    """`os.path.abspath`, with a bucket's path left as it is."""
    path = os.fspath(path)
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path)


def filesystem(path: str) -> Any:
    """Return fsspec's file system for a remote path.

    Raises:
      UserError: the scheme is unknown, or its package is missing.
    """
    import fsspec

    scheme = path.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        how = f'pip install "tpu_tune[{extra}]"' if extra else " ".join(str(error).split())
        raise UserError(f"{path}: {scheme}:// needs a package that is not here: {how}") from error
    except ValueError as error:
        raise UserError(f"{path}: no such kind of storage as {scheme}://; use a local path, or gs://") from error


@contextlib.contextmanager
def _as_os_error(path: str, what: str) -> Iterator[Any]:
    """Yield the file system, and turn its failures, which have no common type, into one OSError."""
    fs = filesystem(path)
    try:
        yield fs
    except FileNotFoundError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(None, f"{what}: {text}", path) from error


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a directory."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.exists(path)
    with _as_os_error(path, "the bucket does not answer") as fs:
        return fs.exists(path)


def is_dir(path: str | os.PathLike) -> bool:
    """Whether there is a directory; in a bucket, any object below it."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.isdir(path)
    with _as_os_error(path, "the bucket does not answer") as fs:
        fs.invalidate_cache()
        return fs.isdir(path)


def list_files(path: str) -> list[str]:
    """The files right in a remote directory, as whole paths, sorted."""
    with _as_os_error(path, "cannot be listed") as fs:
        entries = fs.ls(path, detail=True)
        return sorted(fs.unstrip_protocol(entry["name"]) for entry in entries if entry["type"] == "file")


def list_names(path: str | os.PathLike) -> list[str]:
    """The names of the files and directories right in a directory, sorted; none where there is no such directory."""
    path = os.fspath(path)
    if not is_dir(path):
        return []
    if not is_remote(path):
        return sorted(os.listdir(path))
    with _as_os_error(path, "cannot be listed") as fs:
        return sorted(os.path.basename(entry.rstrip("/")) for entry in fs.ls(path, detail=False))


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file.

    Raises:
      OSError: it is not there, or cannot be read.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return Path(path).read_bytes()
    with _as_os_error(path, "cannot be read") as fs:
        return fs.cat_file(path)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that a kill leaves either the old or the new content.

    Raises:
      OSError: it cannot be written.
    """
    path = os.fspath(path)
    if not is_remote(path):
        with whole_file(path) as aside, open(aside, "wb") as stream:
            stream.write(content)
        return
    with _as_os_error(path, "cannot be written") as fs:
        try:
            fs.pipe_file(path, content)
        except FileNotFoundError as error:
            raise OSError("there is no such bucket") from error


def remove(path: str | os.PathLike) -> None:
    """Remove a file, where there is one.

    Raises:
      OSError: it cannot be removed.
    """
    path = os.fspath(path)
    with contextlib.suppress(FileNotFoundError):
        if not is_remote(path):
            os.unlink(path)
            return
        with _as_os_error(path, "cannot be removed") as fs:
            fs.rm_file(path)


def is_special(path: str | os.PathLike) -> bool:
    """Whether a local path is a device or a pipe that can be written to, and nothing that could be renamed over.

    Raises:
      OSError: it is a disk without a file system, or a socket, which nothing is to be written to.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        kind = "a disk" if stat.S_ISBLK(mode) else "a socket"
        raise OSError(errno.EINVAL, f"it is {kind} and no file; name a file to write", os.fspath(path))
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """Yield a local path to write to; the file becomes `path` when the block ends well, and disappears when not.

    On a disk it lies beside `path`, is flushed and renamed; for a bucket it is a temporary one, uploaded at the end.
    Into a device or a pipe (/dev/null, /dev/stdout) it is copied at the end: a rename would put a file in its place.
    A link stays, and what it leads to is replaced.

    Raises:
      OSError: it cannot be written; to a disk without a file system, or a socket, nothing is. A full disk's error names
        the file.
    """
    try:
        yield from _whole_file(os.fspath(path))
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise


def _whole_file(path: str) -> Iterator[str]:
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, os.path.basename(path))
            yield local
            with _as_os_error(path, "cannot be written") as fs:
                fs.put_file(local, path)
        return
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, os.path.basename(path))
            yield local
            with open(local, "rb") as content, open(path, "wb") as stream:
                shutil.copyfileobj(content, stream, 2**20)
        return
    path = os.path.realpath(path) if os.path.islink(path) else path
    # A name of its own, should two threads or processes write the same file.
    aside = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        with open(aside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)


def make_dirs(path: str | os.PathLike) -> None:
    """Make a local directory and those above it; a bucket has none to make, but has to be there.

    Raises:
      OSError: it cannot be made.
    """
    path = os.fspath(path)
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def check_writable(path: str) -> None:
    """Write an object below a remote path and take it away again.

    Raises:
      OSError: the bucket is not there, or may not be written.
    """
    probe = os.path.join(path, ".write_test")
    write_bytes(probe, b"ok")
    with _as_os_error(path, "cannot be written") as fs:
        with contextlib.suppress(FileNotFoundError):  # another host has taken it away
            fs.rm_file(probe)


@contextlib.contextmanager
def whole_directory(directory: str) -> Iterator[str]:
    """Yield a local directory to fill, which becomes `directory` when the block ends well and disappears when not.

    On a disk it lies beside `directory`, is flushed and renamed; what was there before is moved out of the way first,
    whole, and removed afterwards. For a bucket it is a temporary one, uploaded at the end with one of
    `COMPLETE_MARKERS` last: see `is_complete`.

    Raises:
      UserError: it cannot be written.
    """
    try:
        if is_remote(directory):
            with tempfile.TemporaryDirectory() as local:
                yield local
                _put_directory(local, directory.rstrip("/"))
            return
        parent, name = os.path.split(os.path.abspath(directory))
        aside, before = (os.path.join(parent, f".{name}.{end}") for end in ("tmp", "before"))
        try:
            _clear(aside, before, directory)
            os.makedirs(aside)
            yield aside
            _let_read(aside)
            _flush(aside)
            if os.path.isdir(directory) and not os.path.islink(directory):
                os.replace(directory, before)
            os.replace(aside, directory)
        finally:
            _clear(aside, before, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{directory} cannot be written: {reason}") from error


def _clear(aside: str, before: str, directory: str) -> None:
    """Remove what `whole_directory` has left; what a kill between its two renames has moved away comes back."""
    if os.path.isdir(before) and not os.path.lexists(directory):
        os.replace(before, directory)
    for path in (aside, before):
        shutil.rmtree(path, ignore_errors=True)


def _flush(directory: str) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as stream:
                os.fsync(stream.fileno())


def _let_read(directory: str) -> None:
    """Give files the modes that the umask asks for; safetensors writes them for their owner alone."""
    mode = stat.S_IMODE(os.stat(directory).st_mode) & 0o666  # the directory's own is what the umask has left
    for folder, _, files in os.walk(directory):
        for file in files:
            os.chmod(os.path.join(folder, file), mode)


def is_complete(directory: str) -> bool:
    """Whether `whole_directory` has finished writing a result here."""
    if is_remote(directory):
        return any(exists(os.path.join(directory, name)) for name in COMPLETE_MARKERS)
    return os.path.isdir(directory)


def _put_directory(local: str, path: str) -> None:
    """Replace a remote directory by a local one. The markers go first from the old and come last to the new.

    Raises:
      OSError: a file cannot be written; then no marker is there.
    """
    names = [
        os.path.relpath(os.path.join(folder, file), local) for folder, _, files in os.walk(local) for file in files
    ]
    with _as_os_error(path, "the upload failed") as fs:
        for name in COMPLETE_MARKERS:
            if fs.exists(f"{path}/{name}"):
                fs.rm_file(f"{path}/{name}")
        if fs.isdir(path):
            fs.rm(path, recursive=True)
        for name in sorted(names, key=lambda name: (name in COMPLETE_MARKERS, name)):
            fs.put_file(os.path.join(local, name), f"{path}/{name.replace(os.sep, '/')}")
        fs.invalidate_cache()


_copies: dict[str, tempfile.TemporaryDirectory] = {}  # path and its objects' versions -> where their copy lies


def local_copy(path: str | os.PathLike) -> str:
    """Return where a file or directory lies on this machine: `path` itself, or, of one in a bucket, a temporary copy.

    A copy stays until the process ends, and serves every call as long as the bucket's objects are the same.

    Raises:
      UserError: there is nothing at `path`, or it cannot be copied.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return path
    path = path.rstrip("/")
    try:
        with _as_os_error(path, "cannot be copied") as fs:
            fs.invalidate_cache()
            objects = fs.find(path, detail=True)
            if not objects:
                raise FileNotFoundError
            key = f"{path} {sorted(objects.items())}"
            if key not in _copies:
                _copies[key] = _copied(fs, path, sum(info.get("size") or 0 for info in objects.values()))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file or directory") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error} (the copy goes to $TMPDIR)") from error
    return os.path.join(_copies[key].name, os.path.basename(path))


def _copied(fs: Any, path: str, size: int) -> tempfile.TemporaryDirectory:
    """Return a temporary directory with a copy of `path` (a file, or a directory of `size` bytes) in it."""
    folder = tempfile.TemporaryDirectory(prefix="tpu-tune-")
    if size > _BIG_COPY:
        log.info("%s: copying %.1f GB to %s (TMPDIR says where such copies go)", path, size / 1e9, folder.name)
    local = os.path.join(folder.name, os.path.basename(path))
    if fs.isdir(path):
        fs.get(f"{path}/", f"{local}/", recursive=True)
    else:
        fs.get_file(path, local)
    return folder
