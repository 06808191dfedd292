"""Named datasets: TensorFlow Datasets and the Hugging Face hub.

`tfds:NAME` or `tfds:NAME/CONFIG` (or a directory that TFDS wrote) is read from array_record files, which need no
TensorFlow; `datasets:NAME` or `datasets:NAME:CONFIG` (or a directory) is streamed by Hugging Face's `datasets`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tpu_tune.data.ingest.blobs import Tally
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.picking import picked
from tpu_tune.errors import UserError

PREFIXES = ("tfds:", "datasets:")


def is_named(source: str) -> bool:
    """Whether a source is a dataset's name and not a file."""
    return source.startswith(PREFIXES)


def is_hub_id(text: str) -> bool:
    """Whether a word can be an id of the hub, OWNER/NAME; a name without an owner needs `datasets:` before it."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def read(source: str, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split; `source` is `name:split:row`.

    Raises:
      UserError: the dataset or its split cannot be had.
    """
    kind, _, name = source.partition(":")
    rows = _tfds_rows(name, source, options.split) if kind == "tfds" else _hub_rows(name, source, options.split)
    first = next(rows, None)
    if first is None:
        return
    numbered = (
        (f"{source}:{options.split}:{number}", row)
        for number, row in enumerate(itertools.chain([first], rows), start=1)
    )
    yield from picked(numbered, options, tally, f"{source} ({options.split})", list(first))


def _tfds_rows(name: str, source: str, split: str) -> Iterator[Mapping[str, Any]]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow_datasets as tfds

        if os.path.isdir(name):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
        splits = [str(found) for found in builder.info.splits]
        if split in splits:
            rows = builder.as_data_source(split=split)
            number = len(rows)
    except Exception as error:  # no network, no such dataset, a package it wants: these have no common type
        raise _unavailable(source, error) from error
    if split not in splits:
        raise _no_split(source, split, splits)
    for index in range(number):
        try:
            row = rows[index]
        except Exception as error:
            raise _unavailable(source, error) from error
        yield row


def _hub_rows(name: str, source: str, split: str) -> Iterator[Mapping[str, Any]]:
    name, _, config = name.partition(":")
    try:
        import datasets

        found = datasets.load_dataset(name, config or None, streaming=True)
        splits = list(found)
        rows = iter(found[split]) if split in splits else iter(())
    except Exception as error:  # as above
        raise _unavailable(source, error) from error
    if split not in splits:
        raise _no_split(source, split, splits)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unavailable(source, error) from error
        if row is None:
            return
        yield row


def _unavailable(source: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or "no reason given"
    return UserError(f"{source}: the dataset cannot be had ({type(error).__name__}: {reason})")


def _no_split(source: str, split: str, splits: list[str]) -> UserError:
    return UserError(f"{source}: there is no split '{split}'; there is: {', '.join(splits) or 'none'}")
