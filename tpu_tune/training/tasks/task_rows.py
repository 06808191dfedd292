"""The rows of an evaluation task, each with where it stands: from a file, a directory, a bucket or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.data import saved_sets
from tpu_tune.data.sources import SUFFIXES, is_hub, read_rows, resolve
from tpu_tune.errors import UserError

LocatedRow = tuple[str, dict[str, Any]]  # "file, row 3" and the row


def read_task_rows(path: str, split: str = "", subset: str = "", limit: int = 0) -> list[LocatedRow]:
    """Read the rows to evaluate on.

    Args:
      path: a data file, a directory of them, or a hub dataset id.
      split: the split to take: in a directory the file with this word in its name (`val` is also `validation`), on the
        hub the dataset's. By default the evaluation files or split, or everything.
      subset: the configuration of a hub dataset ("all", "ARC-Easy").
      limit: only the first so many rows; 0 for all.

    Raises:
      UserError: nothing there, no such split, or rows that cannot be read.
    """
    if not path:
        raise UserError("no data given; name a file, a directory or a hub id with --data")
    if subset or (split and _is_hub_id(path)):
        rows = [(f"{path}, row {number}", row) for number, row in enumerate(_hub_rows(path, split, subset), start=1)]
    else:
        train, held_out = resolve(path)
        sources = _of_split(path, train, held_out, split) if split else held_out or train
        rows = []
        for source in sources:
            source_rows, _ = read_rows(source)
            rows += [(f"{source}, row {number}", row) for number, row in enumerate(source_rows, start=1)]
    return rows[:limit] if limit else rows


def _is_hub_id(path: str) -> bool:
    looks_like_file = Path(path).suffix.lower() in SUFFIXES or storage.is_remote(path)
    return (
        not looks_like_file and not Path(path).expanduser().exists() and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path))
    )


def _of_split(path: str, train: list[str], held_out: list[str] | None, split: str) -> list[str]:
    """Return the sources that belong to a split, by the words of their file names."""
    names = {"val": ("val", "valid", "validation", "dev", "eval")}.get(split, (split,))
    if not storage.is_remote(path) and Path(path).expanduser().is_dir():
        directory = Path(path).expanduser()
        if of_splits := saved_sets.splits_of(directory):
            found = [file for name, files in of_splits.items() if saved_sets.kind_of(name) in names for file in files]
            if not found:
                raise UserError(f"{path}: there is no split '{split}'; there is: {', '.join(of_splits)}")
            return found
        files = sorted(
            file
            for file in directory.iterdir()
            if file.suffix.lower() in SUFFIXES and file.name not in saved_sets.NOTES
        )
        sources = [str(file) for file in files]
    else:
        sources = [*train, *(held_out or [])]
        if len(sources) == 1 and not is_hub(sources[0]):
            return sources  # a file is a split of its own
    matching = [source for source in sources if set(names) & set(re.split(r"[-_.]", Path(source).name.lower()))]
    if not matching:
        raise UserError(
            f"{path}: no file of the split '{split}' in its name; there are {', '.join(Path(s).name for s in sources)}"
        )
    return matching


def _hub_rows(name: str, split: str, subset: str) -> list[dict[str, Any]]:
    try:
        import datasets

        splits = datasets.get_dataset_split_names(name, subset or None)
        name_of_split = split or next((known for known in ("validation", "test") if known in splits), splits[0])
        if name_of_split == "val" and "val" not in splits:
            name_of_split = "validation"
        return list(datasets.load_dataset(name, subset or None, split=name_of_split))
    except Exception as error:  # network, permission and missing-dataset errors have no common type
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise UserError(
            f"{name}: the hub dataset could not be loaded ({type(error).__name__}: {reason}); "
            "a file works without a network"
        ) from error
