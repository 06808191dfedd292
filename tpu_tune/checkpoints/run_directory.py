"""`RunDirectory`: the files of a run, on a disk or in a bucket, for whoever writes or reads them.

    config.json      the resolved configuration       checkpoints/<step>/  see `run_checkpoints`
    metrics.jsonl    one row a line                   adapter/ | model/    the result of a finished run
    summary.json     counts, sizes, memory            curves.png, report.html
    samples.jsonl    answers before and after         run.lock             the process that trains, while it does
    calibrated/      see `calibrated`                 initial_adapter/     see `starting`

Small files are written aside and renamed, so that a kill leaves the old or the new one. A file in a bucket cannot be
appended to: `MetricsFile` uploads it whole, now and then, and when it is flushed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import json_text, storage
from tpu_tune.checkpoints.run_values import SUMMARY, metrics_row, without_odd
from tpu_tune.errors import UserError

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class JsonLines:
    """The content of a JSON Lines file that may have been cut off anywhere.

    Attributes:
      rows: the JSON objects, in the file's order.
      lines: the text of each.
      notes: sentences that say which lines could not be read.
    """

    rows: list[dict[str, Any]]
    lines: list[str]
    notes: list[str]


@dataclass(frozen=True)
class RunDirectory:
    """A run directory; nothing is read or made before a method is called.

    Attributes:
      path: local or remote, such as `output/quickstart` or `gs://bucket/run`.
    """

    path: str | os.PathLike

    def file(self, *parts: str) -> str:
        """The path of a file or a directory in it."""
        return os.path.join(self.path, *parts)

    @property
    def checkpoints(self) -> str:
        """The directory of the checkpoints."""
        return self.file("checkpoints")

    # --- what is there -------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether this is a run directory: its config.json is this project's and not a model's."""
        try:
            config = self.read_json("config.json") or {}
        except UserError:
            return False
        return "output_dir" in config and "model_type" not in config

    def config(self) -> ConfigDict:
        """Return the configuration.

        Raises:
          UserError: there is none that can be read.
        """
        recorded = self.recorded()
        if recorded is None:
            raise UserError(f"{self.path} is not a run directory: it has no config.json")
        return configuration.from_dict(recorded)

    def recorded(self) -> dict[str, Any] | None:
        """Return the configuration as recorded, or None where there is none; keys that came later may be missing.

        int4 had 15 levels before `quantize.symmetric` could say so.

        Raises:
          UserError: it cannot be read.
        """
        recorded = self.read_json("config.json")
        quantize = (recorded or {}).get("quantize")
        if isinstance(quantize, dict) and quantize.get("format") == "int4":
            quantize.setdefault("symmetric", True)
        return recorded

    def metrics(self) -> list[dict[str, Any]]:
        """All whole rows of `metrics.jsonl`; none if there is no such file.

        Raises:
          UserError: it cannot be read.
        """
        found = read_json_lines(self.file("metrics.jsonl"))
        return found.rows if found else []

    def summary(self) -> dict[str, Any]:
        """Return `summary.json`, less what is of a wrong type; {} where there is none that can be read."""
        try:
            return without_odd(self.read_json("summary.json") or {}, SUMMARY)[0]
        except UserError:
            return {}

    def samples(self) -> list[dict[str, Any]]:
        """Return the rows of `samples.jsonl` that can be read."""
        try:
            found = read_json_lines(self.file("samples.jsonl"))
        except UserError:
            return []
        return found.rows if found else []

    def saved_steps(self) -> list[int]:
        """The steps of the checkpoints, ascending.

        Raises:
          UserError: the bucket does not answer.
        """
        with one_line_error(self.path):
            return sorted(int(name) for name in storage.list_names(self.checkpoints) if name.isdigit())

    def result(self, method: str) -> str:
        """The path of what training ends with: `adapter` where `method` is lora, else `model`."""
        return self.file("adapter" if method == "lora" else "model")

    def has_result(self, method: str) -> bool:
        """Whether `result` is complete, and the run has not gone on since it was written.

        Raises:
          UserError: the bucket does not answer.
        """
        result = self.result(method)
        with one_line_error(result):
            if not storage.is_complete(result):
                return False
        ended_at = self.summary().get("result_step")
        return ended_at is None or ended_at >= max(self.saved_steps(), default=0)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object in a JSON file; None where there is no such file.

        Raises:
          UserError: it cannot be read, or holds no object.
        """
        file = self.file(name)
        try:
            content = json_text.loads(storage.read_bytes(file))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} cannot be read: it holds a {type(content).__name__} and no JSON object")
        return content

    # --- what is written -----------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise where the directory clearly cannot be made or written, before hours are spent.

        Raises:
          UserError: in one line, what stands in the way.
        """
        if storage.is_remote(self.path):
            try:
                return storage.check_writable(self.path)
            except OSError as error:
                raise UserError(f"output_dir {self.path} cannot be written: {error.strerror or error}") from error
        parent = os.path.abspath(self.path)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent):
            raise UserError(f"output_dir {self.path} cannot be made: {parent} is not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"output_dir {self.path} cannot be written: no permission in {parent}")

    def write_config(self, config: ConfigDict) -> None:
        """Make the directory if needed, and write `config.json`.

        Raises:
          UserError: the directory or the file cannot be written.
        """
        try:
            storage.make_dirs(self.path)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be made: {error.strerror}") from error
        self.write_text("config.json", json.dumps(configuration.to_dict(config), indent=2) + "\n")

    def undo_start(self) -> None:
        """Take away what a start has written that came to nothing: neither a row of metrics nor a checkpoint.

        The same directory then takes another configuration. What cannot be removed stays.
        """
        with contextlib.suppress(OSError, UserError):
            if self.metrics() or self.saved_steps():
                return
            for name in ("summary.json", "samples.jsonl", "metrics.jsonl", "config.json"):
                storage.remove(self.file(name))
            os.rmdir(self.checkpoints)  # a bucket has no directories

    def update_summary(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`: the one that is there, with these values laid over it.

        Raises:
          UserError: it cannot be written.
        """
        text = json.dumps({**self.summary(), **values}, indent=2, default=plain_number)
        self.write_text("summary.json", text + "\n")

    def write_samples(self, rows: list[dict[str, Any]]) -> None:
        """Write `samples.jsonl`.

        Raises:
          UserError: it cannot be written.
        """
        lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() for row in rows]
        self.write_text("samples.jsonl", "\n".join(lines) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file so that a kill or a full disk leaves either the old or the new content.

        Raises:
          UserError: it cannot be written.
        """
        try:
            storage.write_bytes(self.file(name), text.encode())
        except OSError as error:
            raise UserError(f"{self.file(name)} cannot be written: {error.strerror or error}") from error

    def truncate_metrics(self, step: int) -> int:
        """Drop the rows past `step`, and a half-written last line, before a resumed run writes them again.

        Args:
          step: the number of updates that the restored checkpoint holds; 0 keeps only rows of step 0.

        Returns:
          The number of lines dropped.
        """
        text = _read_text(self.file("metrics.jsonl"))
        if text is None:
            return 0
        found = _parse("metrics.jsonl", text)
        kept = [line for line, row in zip(found.lines, found.rows, strict=True) if row.get("step", 0) <= step]
        after = "".join(line + "\n" for line in kept)
        if after != text:
            self.write_text("metrics.jsonl", after)
        return len(_split(text)) - len(kept)


class MetricsFile:
    """`metrics.jsonl`, open for rows. On a disk each is written at once; in a bucket the file is uploaded by `flush`.

    Args:
      run: the run directory.
      seconds: least time between uploads to a bucket by `append`; Google allows one a second.
      clock: seconds; for tests.
    """

    def __init__(self, run: RunDirectory, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic):
        self._file = run.file("metrics.jsonl")
        self._seconds, self._clock, self._last_upload = seconds, clock, -math.inf
        self._text: str | None = None  # the whole file, in a bucket
        self._pending = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; numbers of NumPy and JAX become plain ones, non-finite ones null.

        Raises:
          UserError: the file cannot be written, e.g. because the disk is full.
        """
        line = json.dumps({key: plain_number(value) for key, value in row.items()}) + "\n"
        if storage.is_remote(self._file):
            self._text = (self._read() if self._text is None else self._text) + line
            self._pending = True
            if self._clock() - self._last_upload >= self._seconds:
                self.flush()
            return
        try:
            with open(self._file, "a", encoding="utf-8") as stream:
                stream.write(line)  # closing flushes: rows are few and each must survive a kill
        except OSError as error:
            raise self._error(error) from error

    def flush(self) -> None:
        """Upload what is held back.

        Raises:
          UserError: as `append`.
        """
        if not self._pending:
            return
        try:
            storage.write_bytes(self._file, self._text.encode())
        except OSError as error:
            raise self._error(error) from error
        self._pending, self._last_upload = False, self._clock()

    def _read(self) -> str:
        try:
            return storage.read_bytes(self._file).decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> UserError:
        return UserError(
            f"{self._file} cannot be written: {error.strerror}; once that is mended, the same command goes on from the "
            "last checkpoint"
        )


@contextlib.contextmanager
def one_line_error(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError into one line.

    Raises:
      UserError: in its place.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def plain_number(value: Any) -> Any:
    """A NumPy or JAX scalar as Python's own; None for what is not finite, because JSON has no NaN."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_lines(file: str) -> JsonLines | None:
    """Read a JSON Lines file as far as it can be read; None where there is no such file.

    A row of a metrics.jsonl must have its step, and numbers where numbers belong, to count as readable.

    Raises:
      UserError: it cannot be read at all.
    """
    text = _read_text(file)
    return None if text is None else _parse(os.path.basename(file), text)


def _read_text(file: str) -> str | None:
    with one_line_error(file):
        try:
            return storage.read_bytes(file).decode("utf-8", errors="replace").replace("\r\n", "\n")
        except (FileNotFoundError, NotADirectoryError):
            return None


def _split(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []  # str.splitlines would part rows at U+2028 too


def _parse(name: str, text: str) -> JsonLines:
    lines = _split(text)
    found, bad = JsonLines([], [], []), []
    for number, line in enumerate(lines, start=1):
        try:
            row = json_text.loads(line)
        except ValueError:  # such as a line that a kill or a full disk cut off
            row = None
        row = metrics_row(row) if name == METRICS else row
        if isinstance(row, dict):
            found.rows.append(row)
            found.lines.append(line)
        elif line.strip():
            bad.append(number)
    if bad == [len(lines)]:
        found.notes.append(f"the last line of {name} is cut off and was left out")
    elif bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        found.notes.append(f"line {bad[0]}{more} of {name} cannot be read and was left out")
    return found
