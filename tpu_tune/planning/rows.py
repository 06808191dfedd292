"""How many rows a run would train on: as given, or guessed from the size of the files that the configuration names."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ml_collections import ConfigDict

from tpu_tune.data.sources import resolve

_BYTES_A_TOKEN = 4  # of English text, about; of JSON around it nothing is taken off
_COUNTED_BYTES = 2**30  # larger files are not read for their lines


def guess_rows(config: ConfigDict, one_each: bool) -> int | None:
    """Return about how many rows the training data makes; None where that is not known without reading it all.

    Args:
      config: the whole configuration; nothing is fetched, and nothing tokenized.
      one_each: whether a row is one example; otherwise they are packed.

    Raises:
      UserError: a directory without data files, or a file of another kind.
    """
    path = config.data.train
    if not path or not os.path.exists(os.path.expanduser(path)):
        return None
    files = [Path(name) for name in resolve(path)[0]]
    size = sum(file.stat().st_size for file in files)
    if not one_each:
        if any(file.suffix.lower() == ".parquet" for file in files):  # compressed
            return None
        rows = size / _BYTES_A_TOKEN / config.data.max_length
    elif size > _COUNTED_BYTES or any(file.suffix.lower() not in (".jsonl", ".ndjson") for file in files):
        return None
    else:
        rows = sum(_lines(file) for file in files)
    kept = 1.0 if config.data.eval else 1.0 - config.data.eval_ratio
    return max(1, math.floor(rows * kept))


def _lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())
