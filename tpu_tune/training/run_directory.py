"""The run directory: `config.json`, `metrics.jsonl` (`summary` has its other files), and whether a start continues the run that is there.

`open_run` is the first thing a start does: it holds the new configuration against the recorded one and refuses what
would silently change a run half-way. Files are written aside and renamed, so that a kill leaves the old or the new one.
The directory may be in a bucket (`storage`), where a file cannot be appended to: `MetricsFile` uploads it whole, now and
then, and before every checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.errors import UserError

# What may differ between two starts of one run: how long it goes on, what it reports, and the machine it runs on.
MAY_CHANGE = (
    "output_dir", "mesh.", "data.num_workers", "data.cache_dir", "train.max_steps", "train.num_train_epochs",
    "train.logging_", "train.save_", "train.eval_", "train.report_to", "train.per_device_eval_batch_size",
    "model.remat", "model.token_chunk_size", "train.optim_offload", "train.loss_chunk_size",
    "train.early_stopping_", "train.load_best_model_at_end", "train.max_nonfinite_steps",
    "train.sample_prompts",
)  # fmt: skip
_SCHEDULE = ("train.max_steps", "train.num_train_epochs")
_SEEDS = ("seed", "data.data_seed")


@dataclass(frozen=True)
class RunStart:
    """What `open_run` found.

    Attributes:
      config: the configuration with seeds of -1 replaced by the recorded or freshly drawn ones.
      resuming: whether the directory already held this run.
      notes: lines to tell the user, e.g. that the schedule changed.
    """

    config: ConfigDict
    resuming: bool
    notes: list[str] = field(default_factory=list)


def path(output_dir: str | os.PathLike, *parts: str) -> str:
    """A path inside the run directory."""
    return os.path.join(os.fspath(output_dir), *parts)


def open_run(config: ConfigDict, write: bool = True) -> RunStart:
    """Check the run directory against `config`; make it if needed, and write `config.json`.

    Args:
      config: the whole configuration; `config.output_dir` is the run directory. It is not modified.
      write: False only looks, so that a start that fails later leaves nothing behind; `write_config` follows. With
        several processes give explicit seeds: a seed of -1 is drawn by each process for itself.

    Returns:
      The configuration to use, whether this start resumes, and notes for the user.

    Raises:
      UserError: the directory cannot be made, its config.json is unreadable, or it belongs to another run.
    """
    directory, file = config.output_dir, path(config.output_dir, "config.json")
    recorded = _read_config(file)
    if recorded is not None:
        recorded = {**dict(configuration.flatten(configuration.default())), **recorded}
    elif storage.is_dir(path(directory, "checkpoints")):
        raise UserError(
            f"{directory} holds checkpoints but no config.json, so they cannot be continued; choose another output_dir"
        )
    resolved, notes = _resolve_seeds(config, recorded)
    if recorded is not None:
        notes += _compare(directory, recorded, dict(configuration.flatten(resolved)))
    if write:
        write_config(resolved)
    else:
        _check_place(directory)
    return RunStart(resolved, recorded is not None, notes)


def with_seeds(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Return the configuration with seeds of -1 replaced as `open_run` does, and a line on each; nothing is written."""
    return _resolve_seeds(config, _read_config(path(config.output_dir, "config.json")))


def _resolve_seeds(config: ConfigDict, recorded: Mapping[str, Any] | None) -> tuple[ConfigDict, list[str]]:
    resolved, notes = configuration.from_dict(configuration.to_dict(config)), []
    for key in _SEEDS:
        if configuration.config_get(config, key) == -1:
            value = (recorded or {}).get(key)
            value = secrets.randbelow(2**31) if value is None else value
            configuration.assign(resolved, key, value)
            notes.append(f"{key} = {value}")
    return resolved, notes


def write_config(config: ConfigDict) -> None:
    """Make the run directory if needed, and write its `config.json`.

    Raises:
      UserError: the directory or the file cannot be written.
    """
    try:
        storage.make_dirs(config.output_dir)
    except OSError as error:
        raise UserError(f"output_dir {config.output_dir} cannot be made: {error.strerror}") from error
    write_aside(path(config.output_dir, "config.json"), json.dumps(configuration.to_dict(config), indent=2) + "\n")


def check_shared(output_dir: str | os.PathLike) -> None:
    """Hold against several hosts that each has a disk of its own: all have to see what process 0 has written.

    Raises:
      UserError: there is no config.json.
    """
    if _read_config(path(output_dir, "config.json")) is None:
        raise UserError(
            f"output_dir {output_dir}: process 0's config.json is not there; hosts need one place for checkpoints, a gs:// path or a shared disk"
        )


def _check_place(directory: str) -> None:
    """Raise where `directory` clearly cannot be made or written, before hours are spent."""
    if storage.is_remote(directory):
        try:
            return storage.check_writable(directory)
        except OSError as error:
            raise UserError(f"output_dir {directory} cannot be written: {error.strerror or error}") from error
    place = os.path.abspath(directory)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"output_dir {directory} cannot be made: {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {directory} cannot be written: no permission in {place}")


def _read_config(file: str) -> dict[str, Any] | None:
    try:
        return dict(configuration.flatten(json.loads(storage.read_bytes(file).decode())))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); choose another output_dir, or remove it") from error


def _compare(directory: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Raise at a difference that may not be; return what is to be said about those that may."""
    notes = []
    different = {key: (old[key], value) for key, value in new.items() if _plain(old[key]) != _plain(value)}
    fixed = [key for key in different if not key.startswith(MAY_CHANGE)]
    if fixed:
        each = "; ".join(f"{key} was {_show(different[key][0])} and is now {_show(different[key][1])}" for key in fixed)
        raise UserError(
            f"output_dir {directory} holds a run with another configuration: {each}. "
            "Choose another output_dir, or set the old value to go on with that run"
        )
    for key in _SCHEDULE:
        if key in different:
            before, now = different[key]
            notes.append(
                f"{key} was {before} and is now {now}: from here on the learning rate follows the schedule of the new "
                "length, while the updates already made followed the old one"
            )
    return notes


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _show(value: Any) -> str:
    return json.dumps(value)


def write_aside(file: str, text: str) -> None:
    """Write a text file so that a kill or a full disk leaves either the old or the new content."""
    try:
        storage.write_bytes(file, text.encode())
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error


def append_metrics(output_dir: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Append one row to `metrics.jsonl`; numbers of NumPy and JAX become plain ones, non-finite ones null.

    Raises:
      UserError: the file cannot be written, e.g. because the disk is full.
    """
    file = MetricsFile(output_dir)
    file.append(row)
    file.flush()


class MetricsFile:
    """`metrics.jsonl`, open for rows. On a disk each is written at once; in a bucket the file is uploaded by `flush`.

    Args:
      output_dir: the run directory.
      seconds: in a bucket, between uploads that nobody asked for; Google allows one a second.
      clock: seconds; for tests.
    """

    def __init__(
        self, output_dir: str | os.PathLike, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic
    ):
        self._file = path(output_dir, "metrics.jsonl")
        self._seconds, self._clock, self._last = seconds, clock, -math.inf
        self._text: str | None = None  # the whole file, in a bucket
        self._pending = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Raises:
          UserError: as `append_metrics`.
        """
        line = json.dumps({key: plain_number(value) for key, value in row.items()}) + "\n"
        if storage.is_remote(self._file):
            self._text = (self._read() if self._text is None else self._text) + line
            self._pending = True
            if self._clock() - self._last >= self._seconds:
                self.flush()
            return
        try:
            with open(self._file, "a", encoding="utf-8") as stream:
                stream.write(line)  # closing flushes: rows are few and each must survive a kill
        except OSError as error:
            raise self._mistake(error) from error

    def flush(self) -> None:
        """Upload what is held back.

        Raises:
          UserError: as `append_metrics`.
        """
        if not self._pending:
            return
        try:
            storage.write_bytes(self._file, self._text.encode())
        except OSError as error:
            raise self._mistake(error) from error
        self._pending, self._last = False, self._clock()

    def _read(self) -> str:
        try:
            return storage.read_bytes(self._file).decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise self._mistake(error) from error

    def _mistake(self, error: OSError) -> UserError:
        return UserError(
            f"{self._file} cannot be written: {error.strerror}; once that is mended, the same command goes on from the last checkpoint"
        )


def plain_number(value: Any) -> Any:
    """A NumPy or JAX scalar as Python's own; None for what is not finite, because JSON has no NaN."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """All whole rows of `metrics.jsonl`; an empty list if there is no such file."""
    return [row for _, row in _rows(output_dir)]


def truncate_metrics(output_dir: str | os.PathLike, step: int) -> int:
    """Drop the rows past `step`, and a half-written last line, before a resumed run writes them again.

    Args:
      output_dir: the run directory.
      step: the number of updates that the restored checkpoint holds; 0 keeps only rows of step 0.

    Returns:
      The number of rows dropped.
    """
    file = path(output_dir, "metrics.jsonl")
    if not storage.exists(file):
        return 0
    before = _text(file)
    kept = [line for line, row in _rows(output_dir) if row.get("step", 0) <= step]
    after = "".join(line + "\n" for line in kept)
    if after != before:
        write_aside(file, after)
    return len(before.splitlines()) - len(kept)


def _text(file: str) -> str:
    return storage.read_bytes(file).decode("utf-8", errors="replace").replace("\r\n", "\n")


def _rows(output_dir: str | os.PathLike) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = _text(path(output_dir, "metrics.jsonl")).splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill or a full disk cut off
            continue
        if isinstance(row, dict):
            rows.append((line, row))
    return rows
