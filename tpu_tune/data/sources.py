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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.data import columnar, saved_sets
from tpu_tune.data.formats import ANOTHER_READS
from tpu_tune.data.messages import without_nulls
from tpu_tune.data.saved_sets import EVAL_NAMES, TRAIN_NAMES
from tpu_tune.errors import UserError, counted

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_HUB = "hub:"  # a hub source is written hub:<dataset id>:<split>
_SKIP_ADVICE = "fix it or set data.skip_bad_rows=True"


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read: where it is and what is wrong with it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def with_advice(bad: BadRow, advice: str) -> str:
    """Return what is wrong and what to do, but never to skip a row that is good and of another format."""
    return str(bad) if ANOTHER_READS in bad.reason else f"{bad}; {advice}"


def resolve(path: str) -> tuple[list[str], list[str] | None]:
    """Find the sources behind `path`.

    Args:
      path: a data file, a directory of data files, or a hub dataset id.

    Returns:
      (training sources, evaluation sources or None), each to be given to `read_rows`. In a directory, files named
      `train*` are the training set and files named `val*`, `validation*`, `dev*`, `eval*` or `test*` (the first kind
      present) the evaluation set; where no file is named `train*`, every other data file is training data. Of a set
      that `datasets` saved, or a clone of a hub repository whose README names files, the index says which they are.

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
        try:
            return _resolve_directory(str(location))
        except OSError as error:
            raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
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
        return _resolve_directory(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _resolve_directory(directory: str) -> tuple[list[str], list[str] | None]:
    splits = saved_sets.splits_of(directory)
    if splits is not None and list(splits) == [""]:
        return splits[""], None
    # Hub repositories keep theirs in data/, and some a directory for each split.
    if splits is None and not (files := _data_files(directory) or _data_files(os.path.join(directory, "data"))):
        splits = _split_directories(directory) or _split_directories(os.path.join(directory, "data"))
    if not splits:
        return _split_files(directory, files)
    for file in (file for of_split in splits.values() for file in of_split):
        if Path(file).suffix.lower() not in SUFFIXES:
            raise UserError(f"{file}: unknown kind of data file '{Path(file).suffix}'; known: {', '.join(SUFFIXES)}")
    train, held_out = saved_sets.choose_splits(directory, splits)
    return splits[train], splits[held_out] if held_out else None


def _split_files(directory: str, files: list[str]) -> tuple[list[str], list[str] | None]:
    if not files:
        raise UserError(f"{directory}: no data files in this directory; known kinds: {', '.join(SUFFIXES)}")
    kinds = {file: saved_sets.kind_of(Path(file).name) for file in files}
    train = [file for file in files if kinds[file] in TRAIN_NAMES]
    train = train or [file for file in files if kinds[file] not in EVAL_NAMES]
    if not train:
        names = ", ".join(Path(file).name for file in files)
        raise UserError(f"{directory}: only evaluation files here ({names}); add a train.jsonl")
    kind = next((name for name in EVAL_NAMES if name in kinds.values()), None)
    held_out = [file for file in files if kinds[file] == kind]
    return train, held_out or None


def _data_files(directory: str) -> list[str]:
    """The data files right in a directory; the notes of `datasets` are none, nor is what its `map` has cached."""
    if storage.is_remote(directory):
        files = storage.list_files(directory) if storage.is_dir(directory) else []
    elif os.path.isdir(directory):
        files = sorted(str(file) for file in Path(directory).iterdir() if file.is_file())
    else:
        files = []
    names = ((file, os.path.basename(file)) for file in files)
    return [
        file
        for file, name in names
        if Path(name).suffix.lower() in SUFFIXES
        and name not in saved_sets.NOTES
        and not (name.startswith("cache-") and name.endswith(".arrow"))
    ]


def _split_directories(directory: str) -> dict[str, list[str]]:
    """The data files of each directory that is named as a split is."""
    names = [name for name in storage.list_names(directory) if saved_sets.kind_of(name) in (*TRAIN_NAMES, *EVAL_NAMES)]
    found = {name: _data_files(os.path.join(directory, name)) for name in names}
    return {name: files for name, files in found.items() if files}


def _resolve_hub(name: str) -> tuple[list[str], list[str] | None]:
    try:
        import datasets

        splits = datasets.get_dataset_split_names(name)
    except Exception as error:  # network, permission and missing-dataset errors have no common type
        raise _no_hub(name, error) from error
    train = next((split for split in splits if split in TRAIN_NAMES), splits[0])
    held_out = next((split for split in EVAL_NAMES if split in splits and split != train), None)
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
        if suffix in (".parquet", ".arrow"):
            rows, bad = _read_columns(path, suffix), []
        else:
            readers = {".json": _read_json, ".csv": _read_table, ".tsv": _read_table}
            rows, bad = readers.get(suffix, _read_json_lines)(path, _read_bytes(path))
    if bad and not skip_bad_rows:
        raise UserError(f"{bad[0]}; {_SKIP_ADVICE}")
    if not rows:
        which = f" that can be read ({counted(len(bad), 'bad one')}, first {bad[0]})" if bad else ""
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
        row, reason = parse_row(line)
        if row is None:
            bad.append(BadRow(f"{path}:{number}", reason))
        else:
            rows.append(row)
    return rows, bad


def likely_encoding(content: bytes) -> str:
    """Return the encoding that a text which is not UTF-8 most likely has: UTF-16 by its zeros, else a one-byte one.

    Western European texts are meant; which one-byte encoding it is cannot be told from the bytes.
    """
    for name, first in (("utf-16-le", 1), ("utf-16-be", 0)):
        if 2 * content[first::2].count(0) > len(content) // 2 > 0:
            return name
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


def parse_row(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return (the object in a line of JSON Lines, None), or (None, why it is no row)."""
    try:
        value = json_text.loads(line)
    except UnicodeDecodeError as error:
        return None, f"not valid UTF-8 (byte {error.start + 1} of the line; perhaps {likely_encoding(line)})"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg})"
    if not isinstance(value, dict):
        return None, f"not a JSON object but a {_kind(value)}"
    return value, ""


def _read_json(path: str, content: bytes) -> tuple[list[dict], list[BadRow]]:
    text = _decode(path, content)
    try:
        value = json_text.loads(text)
    except json_text.BadJson as error:
        raise UserError(f"{path}: not valid JSON ({error.msg}); fix it") from error
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
        header = columnar.unique_names(next(reader))
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


def _read_columns(path: str, suffix: str) -> list[dict]:
    try:
        if suffix == ".arrow":
            batches = (batch for batch, _ in columnar.open_arrow(path)[1])
            return list(columnar.rows_of(batches, "Arrow"))
        return list(columnar.rows_of(columnar.parquet_batches(_open_parquet(path)), "Parquet"))
    except (OSError, columnar.BadTable) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _open_parquet(path: str) -> Any:
    import pyarrow

    if not storage.is_remote(path):
        return columnar.open_parquet(path, os.path.getsize(path))
    content = storage.read_bytes(path)
    return columnar.open_parquet(pyarrow.BufferReader(content), len(content))


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
        raise UserError(f"{path}:{line}: {_other_encoding(content)}") from error


def _other_encoding(content: bytes) -> str:
    likely = likely_encoding(content)
    return (
        f"not valid UTF-8; save the file as UTF-8 (perhaps it is {likely}: "
        f"tpu-tune data ingest --encoding {likely} reads such files)"
    )


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", type(None): "null", dict: "object"}
    return names.get(type(value), "number")
