"""Split a JSON Lines file into training and validation rows, as the guide's script does, with a seed.

Lines are copied byte for byte, in their order, and never held: one pass where every row is drawn by itself, two where
the number of validation rows is exact (the first counts). Empty lines are no rows and are left out. The same seed and
input give the same two files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import json_text
from tpu_tune.data.streams import MAX_ROW_BYTES, Skipped, aside, progress, read_lines
from tpu_tune.errors import UserError, counted

MANY_ROWS = 1_000_000  # from here on a set is large: 0.01% of it is for validation, 0.1% below
TRAIN, VALIDATION = "train.jsonl", "val.jsonl"

logger = logging.getLogger(__name__)
_Choose = Callable[[str], bool]  # value of a row's key ("" without one) -> whether the row is for validation


@dataclass(frozen=True)
class SplitOptions:
    """How to split. At most one of `share` and `count`; with neither, `rule` says how many rows.

    Attributes:
      share: the part of the rows for validation, in (0, 1). Each row is drawn by itself, so that it holds on average;
        with `stratify_key` the number of rows is exact.
      count: so many rows for validation; with `group_key` whole groups until there are so many.
      group_key: key of the rows (`a.b` for one inside another); rows with the same value stay together.
      stratify_key: key of the rows; each of its values has the same share of its rows in validation.
      seed: decides which rows.
    """

    share: float | None = None
    count: int | None = None
    group_key: str = ""
    stratify_key: str = ""
    seed: int = 42


def parse_ratio(text: str) -> float:
    """Return the validation share of `train_ratio,val_ratio`; only the relation of the two counts.

    Raises:
      UserError: not two numbers, or not both above 0, in the guide's own words.
    """
    try:
        train, validation = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError("Invalid split_ratio format. Please use 'train_ratio,val_ratio'") from error
    if not (0 < train < math.inf and 0 < validation < math.inf):
        raise UserError("Invalid ratios. train_ratio and val_ratio must be greater than 0.")
    return validation / (train + validation)


def rule(rows: int) -> int:
    """Validation rows by the guide's rule of thumb: 0.1%, or 0.01% from `MANY_ROWS` on; at least one, never all.

    Raises:
      UserError: there are fewer than two rows.
    """
    if rows < 2:
        raise UserError(f"only {counted(rows, 'row')}: there is none to hold out for validation")
    return max(1, round(rows * (0.0001 if rows >= MANY_ROWS else 0.001)))


def split_file(
    path: str | os.PathLike, output_dir: str | os.PathLike, options: SplitOptions, skip_bad: bool = False
) -> dict[str, Any]:
    """Write `train.jsonl` and `val.jsonl`; both are renamed into place together, when both are whole.

    Args:
      path: a .jsonl file, gzipped or not.
      output_dir: where to write; made where it is missing.
      skip_bad: leave out and count lines that are too long, or where a key is asked for, that do not have it.

    Returns:
      `rows`, `train_rows`, `val_rows`, `bad_rows`, `seed`; `train` and `val`, the files; with `stratify_key` also
      `strata`, value -> rows for validation.

    Raises:
      UserError: the input cannot be read or would be overwritten, a bad line, or options that cannot be met.
    """
    path = os.fspath(path)
    outputs = [Path(output_dir, name) for name in (TRAIN, VALIDATION)]
    for output in outputs:
        if os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            raise UserError(f"{path}: the split would overwrite its own input; name another --output-dir")
    choose, figures = _plan(path, options, skip_bad)
    skipped, counts = Skipped(skip_bad), [0, 0]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(stack.enter_context(aside(output)), "wb")) for output in outputs]
        for line, key in progress(_rows(path, options, skipped), "split"):
            side = int(choose(key))
            files[side].write(line)
            counts[side] += 1
        if not sum(counts):
            raise UserError(f"{path}: no rows")
    if not counts[1]:
        logger.warning(
            "%s is empty: none of the %d rows was drawn; take a larger share, --val-count or --auto",
            outputs[1],
            counts[0],
        )
    elif not counts[0]:
        logger.warning("%s is empty: all %d rows were drawn for validation", outputs[0], counts[1])
    return {
        "rows": sum(counts),
        "train_rows": counts[0],
        "val_rows": counts[1],
        "bad_rows": skipped.count,
        "seed": options.seed,
        "train": str(outputs[0]),
        "val": str(outputs[1]),
        **figures,
    }


def _rows(path: str, options: SplitOptions, skipped: Skipped) -> Iterator[tuple[bytes, str]]:
    """Yield (line, value of its group or stratum); a line is parsed only where there is a key to find."""
    key = options.group_key or options.stratify_key
    for number, line in read_lines(path):
        if line is None:
            skipped.add(f"{path}:{number}", f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB")
        elif line.strip():
            value, reason = _value(line, key) if key else ("", "")
            if reason:
                skipped.add(f"{path}:{number}", reason)
            else:
                yield line, value


def _value(line: bytes, key: str) -> tuple[str, str]:
    """Return (value of the key as text, reason why there is none)."""
    try:
        row = json_text.loads(line.decode("utf-8-sig"))
    except ValueError:
        return "", "not valid JSON in UTF-8"
    value = row
    for part in [key] if isinstance(row, dict) and key in row else key.split("."):
        if not isinstance(value, dict) or part not in value:
            has = ", ".join(row) if isinstance(row, dict) else "none"
            return "", f"the row has no '{key}'; its keys: {has}"
        value = value[part]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True), ""


def _plan(path: str, options: SplitOptions, skip_bad: bool) -> tuple[_Choose, dict[str, Any]]:
    """Return what decides over each row, and figures about it; reads the file once where rows are to be counted."""
    if options.share is not None and options.count is not None:
        raise UserError("a ratio and a number of validation rows: give one of them")
    if options.group_key and options.stratify_key:
        raise UserError("--group-key and --stratify cannot both be kept; give one of them")
    generator = random.Random(options.seed)
    if options.share is not None and not options.stratify_key:
        train_share = 1 - options.share
        if options.group_key:
            return lambda value: _position(value, options.seed) >= train_share, {}
        return lambda _: generator.random() >= train_share, {}
    sizes = Counter(value for _, value in progress(_rows(path, options, Skipped(skip_bad)), "count"))
    total = sizes.total()
    try:
        count = _validation_rows(total, options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if options.group_key:
        return _whole_groups(path, sizes, count, options), {"groups": len(sizes)}
    left, quota = dict(sizes), _shares(sizes, count)

    def choose(value: str) -> bool:
        # Selection sampling (Knuth, volume 2, 3.4.2, algorithm S): exact, and every choice is equally likely.
        taken = generator.random() * left[value] < quota[value]
        left[value] -= 1
        quota[value] -= taken
        return taken

    return choose, {"strata": dict(quota)} if options.stratify_key else {}


def _validation_rows(total: int, options: SplitOptions) -> int:
    if options.count is None:
        return rule(total) if options.share is None else round(options.share * total)
    if not 0 < options.count < total:
        raise UserError(f"--val-count {options.count}: must be at least 1 and below the number of rows, {total}")
    return options.count


def _position(value: str, seed: int) -> float:
    """Where a group stands in [0, 1): it depends on nothing but the value and the seed."""
    digest = hashlib.blake2b(f"{seed}:{value}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _whole_groups(path: str, sizes: Counter, count: int, options: SplitOptions) -> _Choose:
    chosen, rows = set(), 0
    for value in sorted(sizes, key=lambda value: _position(value, options.seed), reverse=True):
        if rows >= count:
            break
        chosen.add(value)
        rows += sizes[value]
    if len(chosen) == len(sizes):
        raise UserError(
            f"{path}: {counted(count, 'validation row takes', 'validation rows take')} every value of "
            f"'{options.group_key}' ({len(sizes)}); ask for fewer"
        )
    return chosen.__contains__


def _shares(sizes: Counter, count: int) -> dict[str, int]:
    """Divide `wanted` in proportion to the sizes, by largest remainders."""
    total = sizes.total()
    shares = {value: size * count // total for value, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda value: (-(sizes[value] * count % total), value))
    for value in by_remainder[: count - sum(shares.values())]:
        shares[value] += 1
    return shares
