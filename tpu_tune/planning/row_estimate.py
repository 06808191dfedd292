"""The number of rows that a run would train on, estimated from the size of the configuration's data files."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ml_collections import ConfigDict

from tpu_tune.data.sources import resolve

_BYTES_PER_TOKEN = 4  # roughly, of English text; JSON syntax around the text is counted as text
_MAX_COUNTED_BYTES = 2**30  # the lines of larger files are not counted


def estimate_rows(config: ConfigDict, packed: bool) -> int | None:
    """Return the approximate number of training rows; None if only reading and tokenizing all data would tell.

    Args:
      config: the whole configuration; nothing is downloaded or tokenized.
      packed: whether several examples are packed into a row; otherwise a row is one example.

    Raises:
      UserError: a directory without data files, or a file of another kind.
    """
    path = config.data.train
    if not isinstance(path, str) or not path or not os.path.exists(os.path.expanduser(path)):
        return None
    files = [Path(name) for name in resolve(path)[0]]
    size = sum(file.stat().st_size for file in files)
    data = config.data
    held_out = 0 if data.eval else data.eval_dataset_size
    if packed:
        if data.max_train_samples or held_out or any(file.suffix.lower() == ".parquet" for file in files):  # compressed
            return None
        rows = size / _BYTES_PER_TOKEN / config.data.max_length
    elif size > _MAX_COUNTED_BYTES or any(file.suffix.lower() not in (".jsonl", ".ndjson") for file in files):
        return None
    else:
        rows = sum(_count_lines(file) for file in files)
    rows = rows - held_out if data.eval or held_out else math.floor(rows * (1.0 - data.eval_ratio))
    return max(1, math.floor(min(rows, data.max_train_samples or rows)))


def _count_lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())
