"""Where rows come from: JSON Lines, JSON, CSV, TSV, Parquet and Arrow files, a directory of them, or a hub dataset.

Files and directories may be in a bucket (`gs://bucket/rows.jsonl`), and are read from there whole.

`resolve` turns what the user named into a list of training sources and, where a directory or hub dataset brings its
own, evaluation sources. `read_rows` reads one source into plain dictionaries. Everything that cannot be read is a
`UserError` that names the file and the line, or a counted `BadRow` when the user chose to go on.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.data.formats import without_nulls
from tpu_tune.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_HUB = "hub:"  # a hub source is written hub:<dataset id>:<split>
_TRAIN_NAMES = ("train", "training")
_EVAL_NAMES = ("val", "valid", "validation", "dev", "eval", "evaluation", "test")  # the first kind present is taken
_NOTES = ("dataset_info.json", "state.json")  # what `datasets` saves beside its Arrow files
_SKIP_ADVICE = "fix it or set data.skip_bad_rows=True"


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read: where it is and what is wrong with it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def resolve(path: str) -> tuple[list[str], list[str] | None]:
    """Find the sources behind `path`.

    Args:
      path: a data file, a directory of data files, or a hub dataset id.

    Returns:
      (training sources, evaluation sources or None), each to be given to `read_rows`. In a directory, files named
      `train*` are the training set and files named `val*`, `validation*`, `dev*`, `eval*` or `test*` (the first kind
      present) the evaluation set; where no file is named `train*`, every other data file is training data.

    Raises:
      UserError: nothing there, nothing readable there, or the hub dataset cannot be had.
    """
    if not path:
        raise UserError("no data given; set data.train to a .jsonl file, a directory or a hub id")
    if storage.is_remote(path):
        return _resolve_remote(path.rstrip("/"))
    if any(len(part) > 255 for part in os.fsencode(path).split(b"/")):
        raise UserError(f"{path[:60]}...: there is no such file or directory (a name has 255 bytes at most)")
    location = Path(os.path.expanduser(path))
    if location.is_dir():
        return _resolve_directory(location)
    if location.is_file():
        if location.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: unknown kind of data file '{location.suffix}'; known: {', '.join(SUFFIXES)}")
        return [str(location)], None
    looks_like_file = location.suffix.lower() in SUFFIXES or path.startswith(("/", ".", "~"))
    if looks_like_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"{path}: there is no such file or directory")
    return _resolve_hub(path)


def _resolve_remote(path: str) -> tuple[list[str], list[str] | None]:
    try:
        if not storage.is_dir(path):
            if not storage.exists(path):
                raise UserError(f"{path}: there is no such file or directory")
            if Path(path).suffix.lower() not in SUFFIXES:
                raise UserError(
                    f"{path}: unknown kind of data file '{Path(path).suffix}'; known: {', '.join(SUFFIXES)}"
                )
            return [path], None
        files = [file for file in storage.list_files(path) if Path(file).suffix.lower() in SUFFIXES]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return _split_files(path, files)


def _resolve_directory(directory: Path) -> tuple[list[str], list[str] | None]:
    files = _data_files(directory) or _data_files(directory / "data")  # hub repositories keep theirs in data/
    return _split_files(str(directory), [str(file) for file in files])


def _split_files(directory: str, files: list[str]) -> tuple[list[str], list[str] | None]:
    if not files:
        raise UserError(f"{directory}: no data files in this directory; known kinds: {', '.join(SUFFIXES)}")
    kinds = {file: re.split(r"[-_.]", Path(file).name.lower())[0] for file in files}
    train = [file for file in files if kinds[file] in _TRAIN_NAMES]
    train = train or [file for file in files if kinds[file] not in _EVAL_NAMES]
    if not train:
        names = ", ".join(Path(file).name for file in files)
        raise UserError(f"{directory}: only evaluation files here ({names}); add a train.jsonl")
    kind = next((name for name in _EVAL_NAMES if name in kinds.values()), None)
    held_out = [file for file in files if kinds[file] == kind]
    return train, held_out or None


def _data_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    files = sorted(file for file in directory.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)
    return [file for file in files if file.name not in _NOTES]


def _resolve_hub(name: str) -> tuple[list[str], list[str] | None]:
    try:
        import datasets

        splits = datasets.get_dataset_split_names(name)
    except Exception as error:  # network, permission and missing-dataset errors have no common type
        raise _no_hub(name, error) from error
    train = next((split for split in splits if split in _TRAIN_NAMES), splits[0])
    held_out = next((split for split in _EVAL_NAMES if split in splits and split != train), None)
    return [f"{_HUB}{name}:{train}"], [f"{_HUB}{name}:{held_out}"] if held_out else None


def _no_hub(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or "no reason given"
    return UserError(
        f"{name}: no such file or directory, and the hub dataset could not be had ({type(error).__name__}: {reason})"
    )


def is_hub(source: str) -> bool:
    """Whether `source` (from `resolve`) is a split of a hub dataset and not a local file."""
    return source.startswith(_HUB)


def read_rows(path: str, *, skip_bad_rows: bool = False) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """Read one source into dictionaries.

    Args:
      path: a file, or a hub source as `resolve` writes it.
      skip_bad_rows: count rows that cannot be read instead of stopping at the first.

    Returns:
      (rows, bad rows); the second is empty unless `skip_bad_rows`.

    Raises:
      UserError: the file is missing, empty or unreadable, or holds a bad row.
    """
    if is_hub(path):
        rows, bad = _read_hub(path), []
    else:
        suffix = Path(path).suffix.lower()
        if suffix == ".parquet":
            rows, bad = _read_parquet(path), []
        elif suffix == ".arrow":
            rows, bad = _read_arrow(path), []
        else:
            readers = {".json": _read_json, ".csv": _read_table, ".tsv": _read_table}
            rows, bad = readers.get(suffix, _read_json_lines)(path, _read_bytes(path))
    if bad and not skip_bad_rows:
        raise UserError(f"{bad[0]}; {_SKIP_ADVICE}")
    if not rows:
        which = f" that can be read ({len(bad)} bad ones, first {bad[0]})" if bad else ""
        raise UserError(f"{path}: no rows{which}")
    if is_hub(path) or Path(path).suffix.lower() in (".parquet", ".arrow"):  # in whose structs absent keys are null
        rows = [{key: without_nulls(value) for key, value in row.items()} for row in rows]
    return rows, bad


def _read_bytes(path: str) -> bytes:
    try:
        content = storage.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not content.strip():
        raise UserError(f"{path}: the file is empty")
    return content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write


def _read_json_lines(path: str, content: bytes) -> tuple[list[dict], list[BadRow]]:
    rows, bad = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        reason = ""
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            reason = f"not valid UTF-8 (byte {error.start + 1} of the line)"
        except (json.JSONDecodeError, RecursionError) as error:
            reason = f"not valid JSON ({error.msg if isinstance(error, json.JSONDecodeError) else 'nested too deeply'})"
        else:
            if not isinstance(value, dict):
                reason = f"not a JSON object but a {_kind(value)}"
        if reason:
            bad.append(BadRow(f"{path}:{number}", reason))
        else:
            rows.append(value)
    return rows, bad


def _read_json(path: str, content: bytes) -> tuple[list[dict], list[BadRow]]:
    text = _decode(path, content)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the name .json, as many hub datasets have it
            return _read_json_lines(path, content)
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); fix it") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f'{path}: must hold a list of objects or {{"data": [...]}}, not a {_kind(value)}')
    bad = [
        BadRow(f"{path}, row {number}", f"not a JSON object but a {_kind(row)}")
        for number, row in enumerate(value, start=1)
        if not isinstance(row, dict)
    ]
    return [row for row in value if isinstance(row, dict)], bad


def _read_table(path: str, content: bytes) -> tuple[list[dict], list[BadRow]]:
    text = _decode(path, content)
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.lower().endswith(".tsv") else ",")
    rows, bad = [], []
    try:
        header = next(reader)
        for row in reader:
            if not row:
                continue
            if len(row) == len(header):
                rows.append(dict(zip(header, row, strict=True)))
            else:
                bad.append(BadRow(f"{path}:{reader.line_num}", f"{len(row)} fields where the header has {len(header)}"))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a valid table ({error}); fix it") from error
    return rows, bad


def _read_parquet(path: str) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.BufferReader(storage.read_bytes(path)) if storage.is_remote(path) else path
        return pyarrow.parquet.read_table(source).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as Parquet ({reason})") from error


def _read_arrow(path: str) -> list[dict]:
    import pyarrow

    schema, batches = open_arrow(path)
    return pyarrow.Table.from_batches([batch for batch, _ in batches], schema).to_pylist()


def open_arrow(path: str) -> tuple[Any, Iterator[tuple[Any, Any]]]:
    """Open an Arrow file of either kind, file (mapped into memory where it is local) or stream.

    Returns:
      (pyarrow schema, iterator over (pyarrow record batch, its own metadata or None)).

    Raises:
      UserError: it cannot be read, also while iterating.
    """
    import pyarrow

    try:
        remote = storage.is_remote(path)
        file = pyarrow.BufferReader(storage.read_bytes(path)) if remote else pyarrow.memory_map(path)
        try:
            reader = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            reader = pyarrow.ipc.open_stream(file)
        return reader.schema, _batches(path, reader)
    except (OSError, pyarrow.ArrowException) as error:
        raise _no_arrow(path, error) from error


def _batches(path: str, reader: Any) -> Iterator[tuple[Any, Any]]:
    import pyarrow

    try:
        if isinstance(reader, pyarrow.RecordBatchFileReader):
            for number in range(reader.num_record_batches):
                yield reader.get_batch_with_custom_metadata(number)
        else:
            yield from reader.iter_batches_with_custom_metadata()
    except (OSError, pyarrow.ArrowException) as error:
        raise _no_arrow(path, error) from error


def _no_arrow(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as an Arrow file ({' '.join(str(error).split())[:200]})")


def _read_hub(source: str) -> list[dict]:
    name, split = source.removeprefix(_HUB).rsplit(":", 1)
    try:
        import datasets

        return list(datasets.load_dataset(name, split=split))
    except Exception as error:  # as above: no common type
        raise _no_hub(name, error) from error


def _decode(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8; save the file as UTF-8") from error


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", type(None): "null", dict: "object"}
    return names.get(type(value), "number")
