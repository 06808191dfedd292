"""Files in a bucket beside files on a disk: `gs://bucket/run` where a path may stand.

A path with `scheme://` goes through fsspec, which knows gs:// by gcsfs, s3:// by s3fs and memory:// for tests (Orbax
writes checkpoints itself, through epath and TensorStore). Anything else is a local file, handled by Python alone. A local
file is written aside and renamed; an object appears whole when its upload is complete, so it needs no such care, but a
directory of objects has no rename: `put_directory` uploads the file that makes it complete last.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpu_tune.errors import UserError

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
def _told(path: str, what: str) -> Iterator[Any]:
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
    with _told(path, "the bucket does not answer") as fs:
        return fs.exists(path)


def is_dir(path: str | os.PathLike) -> bool:
    """Whether there is a directory; in a bucket, any object below it."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.isdir(path)
    with _told(path, "the bucket does not answer") as fs:
        fs.invalidate_cache()
        return fs.isdir(path)


def list_files(path: str) -> list[str]:
    """The files right in a remote directory, as whole paths, sorted."""
    with _told(path, "cannot be listed") as fs:
        entries = fs.ls(path, detail=True)
        return sorted(fs.unstrip_protocol(entry["name"]) for entry in entries if entry["type"] == "file")


def list_names(path: str | os.PathLike) -> list[str]:
    """The names of the files and directories right in a directory, sorted; none where there is no such directory."""
    path = os.fspath(path)
    if not is_dir(path):
        return []
    if not is_remote(path):
        return sorted(os.listdir(path))
    with _told(path, "cannot be listed") as fs:
        return sorted(os.path.basename(entry.rstrip("/")) for entry in fs.ls(path, detail=False))


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file.

    Raises:
      OSError: it is not there, or cannot be read.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return Path(path).read_bytes()
    with _told(path, "cannot be read") as fs:
        return fs.cat_file(path)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that a kill leaves either the old or the new content.

    Raises:
      OSError: it cannot be written.
    """
    path = os.fspath(path)
    if is_remote(path):
        with _told(path, "cannot be written") as fs:
            try:
                fs.pipe_file(path, content)
            except FileNotFoundError as error:
                raise OSError("there is no such bucket") from error
        return
    aside = path + ".tmp"
    try:
        with open(aside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError:
        if os.path.exists(aside):
            os.unlink(aside)
        raise


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
    probe = f"{path.rstrip('/')}/.write_test"
    write_bytes(probe, b"ok")
    with (
        _told(path, "cannot be written") as fs,
        contextlib.suppress(FileNotFoundError),
    ):  # another host has taken it away
        fs.rm_file(probe)


def put_directory(local: str, path: str, last: tuple[str, ...]) -> None:
    """Replace a remote directory by a local one. Files named in `last` go first from the old and come last to the new.

    Raises:
      OSError: a file cannot be written; then none of `last` is there.
    """
    names = sorted(
        (os.path.relpath(os.path.join(folder, file), local) for folder, _, files in os.walk(local) for file in files),
        key=lambda name: (name in last, name),
    )
    with _told(path, "cannot be written") as fs:
        for name in last:
            if fs.exists(f"{path}/{name}"):
                fs.rm_file(f"{path}/{name}")
        if fs.isdir(path):
            fs.rm(path, recursive=True)
        for name in names:
            fs.put_file(os.path.join(local, name), f"{path}/{name}")
        fs.invalidate_cache()
