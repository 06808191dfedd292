"""Mixtures: how often an epoch shows the rows of each of several sources, and which ones.

How many rows of each source an epoch has is the same in every epoch: all of them, a `count`, or what the weights and
the stopping rule say (`datasets.interleave_datasets` has the same rules, and draws where this takes the exact shares).
Which ones they are is a pure function of (seed, epoch, position): where an epoch does not show all rows of a source, or
all once more, it goes through them in a random order, and the next epoch goes on where it was, so that none is shown
twice before all have been shown.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.data.sources import resolve
from tpu_tune.errors import UserError

CONCAT, UNDER, OVER, ONCE = "concat", "interleave_under", "interleave_over", "interleave_once"
_KEYS = ("path", "name", "weight", "count")


@dataclass(frozen=True)
class Source:
    """One source of `data.train` or `data.eval`.

    Attributes:
      path: a file, a directory or a hub id.
      name: what its loss is called in evaluations; letters, digits and underscores.
      weight: its share of the rows, relative to the others' weights; None: not given.
      count: its rows in an epoch; None: all.
    """

    path: str
    name: str
    weight: float | None = None
    count: int | None = None


def sources_of(value: str | Sequence[str | Mapping[str, Any]], key: str = "data.train") -> list[Source]:
    """Read `data.train` or `data.eval`: a path, or a list of paths and of {path, name, weight, count}.

    Raises:
      UserError: an entry without a path, with other keys, or with a value that makes no sense; two of one name.
    """
    if isinstance(value, str):
        return [Source(value, _name(value))]
    found = [_source(entry, f"{key} entry {number}") for number, entry in enumerate(value, start=1)]
    if not found:
        raise UserError(f"{key} is an empty list; name at least one source")
    given = Counter(entry["name"] for entry in value if isinstance(entry, Mapping) and entry.get("name"))
    if twice := [name for name, count in given.items() if count > 1]:
        raise UserError(f"{key}: two sources have the name '{twice[0]}'")
    names: Counter[str] = Counter()
    for number, source in enumerate(found):
        names[source.name] += 1
        if names[source.name] > 1:
            found[number] = dataclasses.replace(source, name=f"{source.name}_{names[source.name]}")
    return found


def resolve_all(value: str | Sequence[str | Mapping[str, Any]], key: str = "data.train") -> tuple[list[str], list[str]]:
    """The files behind `data.train` or `data.eval`, to train on and to evaluate on; see `sources.resolve`."""
    found = [resolve(source.path) for source in sources_of(value, key)]
    return [file for train, _ in found for file in train], [file for _, held_out in found for file in held_out or []]


def _source(entry: str | Mapping[str, Any], where: str) -> Source:
    entry = {"path": entry} if isinstance(entry, str) else entry
    if others := [key for key in entry if key not in _KEYS]:
        raise UserError(f"{where} has the unknown key '{others[0]}'; known: {', '.join(_KEYS)}")
    path, weight, count = entry.get("path"), entry.get("weight"), entry.get("count")
    if not isinstance(path, str) or not path:
        raise UserError(f"{where} has no path")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0):
        raise UserError(f"{where}: the weight is {weight!r}; it must be a number that is not negative")
    if count is not None and (isinstance(count, bool) or count != int(count) or count < 1):
        raise UserError(f"{where}: the count is {count!r}; it must be a whole number of rows, at least 1")
    if weight is not None and count is not None:
        raise UserError(f"{where} has a weight and a count; give one of them")
    return Source(path, _name(str(entry.get("name") or path)), weight, None if count is None else int(count))


def _name(path: str) -> str:
    stem = os.path.basename(path.rstrip("/")).split(".")[0] or path
    return re.sub(r"\W+", "_", stem).strip("_") or "data"


def check(sources: Sequence[Source], strategy: str) -> None:
    """Hold weights and counts against `data.mix_strategy`.

    Raises:
      UserError: they do not go together.
    """
    weighted = [source for source in sources if source.weight is not None]
    if strategy == CONCAT and weighted:
        raise UserError(
            f"data.train gives {weighted[0].path} a weight, and data.mix_strategy=concat takes all rows; set "
            "data.mix_strategy=interleave_under or interleave_over, or give counts"
        )
    if strategy != CONCAT and any(source.count is not None for source in sources):
        raise UserError(f"data.train gives counts, which data.mix_strategy={strategy} does not read; set it to concat")
    if weighted and len(weighted) < len(sources):
        missing = next(source for source in sources if source.weight is None)
        raise UserError(f"data.train gives some sources a weight, and {missing.path} none; give all of them one")
    if weighted and not any(source.weight for source in sources):
        raise UserError("data.train: all weights are 0")
    if strategy == OVER and any(source.weight == 0 for source in sources):
        raise UserError("data.mix_strategy=interleave_over ends when all rows were shown; a weight of 0 never does")


def rows_per_epoch(sources: Sequence[Source], sizes: Sequence[int], strategy: str) -> list[int]:
    """How many rows of each source an epoch has.

    Args:
      sources: `check` has accepted them.
      sizes: the rows that each has.
      strategy: concat takes all (or `count`); interleave_under ends an epoch as soon as one source has been shown
        whole, interleave_over when all have, showing others again; interleave_once shows every row once.
    """
    if strategy in (CONCAT, ONCE):
        return [size if source.count is None else source.count for source, size in zip(sources, sizes, strict=True)]
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    lengths = [size / weight for size, weight in zip(sizes, weights, strict=True) if weight]
    length = min(lengths) if strategy == UNDER else max(lengths)
    # The source that ends the epoch is shown whole, whatever rounding makes of the others.
    return [
        size if weight and size / weight == length else round(weight * length)
        for size, weight in zip(sizes, weights, strict=True)
    ]


@dataclass(frozen=True)
class Draw:
    """The examples of each epoch.

    Attributes:
      examples: of each source, its training examples, sorted.
      source_rows: (all examples,) the row of each example; a row's examples stay together.
      counts: rows of each source in an epoch.
      seed: decides the permutations.
    """

    examples: Sequence[np.ndarray]
    source_rows: np.ndarray
    counts: Sequence[int]
    seed: int

    def epoch(self, epoch: int) -> np.ndarray:
        """The examples of an epoch (0-based), source after source; one may be there several times."""
        return np.concatenate([self._of_source(number, epoch) for number in range(len(self.examples))])

    def _of_source(self, number: int, epoch: int) -> np.ndarray:
        examples, count = self.examples[number], self.counts[number]
        _, starts, sizes = np.unique(self.source_rows[examples], return_index=True, return_counts=True)
        whole, some = divmod(count, len(starts))
        rows = np.concatenate([np.arange(len(starts))] * whole + [_some(len(starts), some, epoch, (self.seed, number))])
        first, size = np.repeat(starts[rows], sizes[rows]), sizes[rows]
        return examples[first + np.arange(len(first)) - np.repeat(np.cumsum(size) - size, size)]


def _some(size: int, count: int, epoch: int, seed: tuple[int, int]) -> np.ndarray:
    """The `count` of a source's rows, fewer than it has, that an epoch shows: none of them twice."""
    if not count:
        return np.zeros(0, np.int64)
    turn, first = divmod(epoch * count, size)
    order = _order(size, count, turn, seed)
    if first + count <= size:
        return order[first : first + count]
    return np.concatenate([order[first:], _order(size, count, turn + 1, seed)[: first + count - size]])


def _order(size: int, count: int, turn: int, seed: tuple[int, int]) -> np.ndarray:
    """The order in which a source's rows are shown for the (turn + 1)-th time."""
    # Where an epoch shows the last rows of one turn and the first of the next, those last ones come late in the next.
    begun = turn
    while begun * size % count:
        begun -= 1
    order = np.zeros(0, np.int64)
    for number in range(begun, turn + 1):
        last = order[size - number * size % count :] if number * size % count else order[:0]
        order = np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, number]))).permutation(size)
        is_late = np.isin(order, last)
        order = np.concatenate([order[~is_late], order[is_late]])
    return order


@dataclass(frozen=True)
class MixedRows:
    """Rows to train on that are others in every epoch, `epoch(number)`; by itself it is those of the first.

    Attributes:
      make: epoch -> its rows, `PackedRows` or the like; a pure function.
    """

    make: Callable[[int], Any]

    def __post_init__(self) -> None:
        # Rows of two epochs are held, the numbers of all: packing again is a matter of seconds.
        object.__setattr__(self, "epoch", functools.lru_cache(maxsize=2)(self.make))
        object.__setattr__(self, "count", functools.cache(lambda epoch: len(self.epoch(epoch))))

    def __len__(self) -> int:
        return len(self.epoch(0))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("make", "epoch", "count"):
            raise AttributeError(name)
        return getattr(self.epoch(0), name)
