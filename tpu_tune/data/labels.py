"""What a classification learns: the labels of rows, found, read and put beside their tokens.

A row has a `label` (a class by number or name, or a number to predict) or `labels` (a list of names, or a number for
each label), beside the text, pair or chat that it labels. The kinds are Hugging Face's `problem_type`:
`single_label_classification`, `multi_label_classification`, `regression`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tpu_tune.data.messages import RowError, holds_something
from tpu_tune.data.tokenized_set import TokenizedSet
from tpu_tune.errors import UserError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
KEYS = ("label", "labels")


@dataclasses.dataclass(frozen=True)
class Labels:
    """How rows are labelled.

    Attributes:
      problem_type: as in Hugging Face.
      names: the labels' names in order.
    """

    problem_type: str
    names: tuple[str, ...]

    def read(self, row: Mapping[str, Any]) -> np.ndarray:
        """Return a row's label: (1,) int32, the number of its class, or (labels,) float32, a number for each.

        Raises:
          RowError: it has none, or one that is not among the names.
        """
        value = _value(row)
        if value is None:
            raise RowError(f"no 'label', which a classification learns; its keys: {', '.join(map(str, row))}")
        if self.problem_type == SINGLE:
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            return np.asarray([self._class(value)], np.int32)
        values = value if isinstance(value, list) else [value]
        if self.problem_type == MULTI and (any(isinstance(one, str) for one in values) or not values):
            hot = np.zeros(len(self.names), np.float32)
            hot[[self._class(one) for one in values]] = 1
            return hot
        numbers = [_number(one) for one in values]
        if len(numbers) != len(self.names) or None in numbers:
            raise RowError(f"the label is {value!r}; it must be {len(self.names)} finite numbers")
        if self.problem_type == MULTI and not all(0 <= number <= 1 for number in numbers):
            raise RowError(f"the labels are {value!r}; each must be in 0..1 (or set head.problem_type=regression)")
        return np.asarray(numbers, np.float32)

    def _class(self, value: Any) -> int:
        if isinstance(value, str | int | float) and str(_plain(value)) in self.names:
            return self.names.index(str(_plain(value)))
        number = _whole(value)
        if number is not None and 0 <= number < len(self.names):
            return number
        near = difflib.get_close_matches(str(value), self.names, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        shown = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        raise RowError(f"the label {value!r} is none of the {len(self.names)} labels ({shown}){hint}")


def find_labels(rows: Iterable[Mapping[str, Any]], problem_type: str = "auto") -> Labels:
    """Find out from rows, their columns renamed, how they are labelled.

    Names are sorted. Classes by number from 0 on are LABEL_0, ..., as in transformers; where the numbers begin later
    they are names.

    Raises:
      UserError: no row has a label, or they are of several kinds.
    """
    values = [value for value in map(_value, rows) if value is not None]
    if not values:
        raise UserError(
            "no row has a 'label' (or 'labels'), which a classification learns; data.columns can rename keys"
        )
    if any(isinstance(value, list) for value in values):
        return _find_lists([value if isinstance(value, list) else [value] for value in values], problem_type)
    numbers = [_number(value) for value in values]
    is_whole = all(_whole(value) is not None for value in values)
    if problem_type == REGRESSION or (problem_type == "auto" and None not in numbers and not is_whole):
        return Labels(REGRESSION, _numbered(1))
    if problem_type == MULTI:
        return Labels(MULTI, tuple(sorted({str(_plain(value)) for value in values})))
    if is_whole:
        whole = sorted({_whole(value) for value in values})
        return Labels(SINGLE, _numbered(whole[-1] + 1) if whole[0] <= 0 else tuple(map(str, whole)))
    return Labels(SINGLE, tuple(sorted({str(_plain(value)) for value in values})))


def read_label(labels: Labels | None, row: Mapping[str, Any]) -> np.ndarray:
    """Return a row's label (see `Labels.read`); of a pair of answers (None) its `margin`, TRL's, (1,) float32.

    Raises:
      RowError: there is none that can be read.
    """
    if labels is not None:
        return labels.read(row)
    margin = row.get("margin")
    number = _number(margin) if holds_something(margin) else 0.0
    if number is None or isinstance(margin, bool):
        raise RowError(f"'margin' is {margin!r}; it must be a finite number")
    return np.asarray([number], np.float32)


def labelled(data: TokenizedSet, labels: Mapping[int, np.ndarray], pad_token: int | None) -> TokenizedSet:
    """Return examples with their rows' labels, marked where the head reads them: at the last token of the text.

    Args:
      data: examples. Of a row that was too long only the first part is kept; of a pair both answers are.
      labels: row number -> its label.
      pad_token: id that transformers takes for padding, also where a text ends in it; the last other token is meant.
    """
    whole = np.ones(len(data), bool)
    if data.roles is None:
        whole[1:] = data.source_rows[1:] != data.source_rows[:-1]
    mask, kept = np.zeros((2, len(data.tokens)), bool)
    for example in np.flatnonzero(whole):
        start, stop = data.offsets[example : example + 2]
        real = np.flatnonzero(data.tokens[start:stop] != pad_token)
        mask[start + (real[-1] if len(real) else 0)] = True
        kept[start:stop] = True
    rows = data.source_rows[whole]
    counts = {"examples": len(rows), "tokens": int(kept.sum()), "target_tokens": len(rows)}
    if data.roles is None:
        counts |= {"truncated": data.summary["truncated"] + data.summary["split"], "split": 0}
        counts |= {"eos_lost": 0, "open_ended": 0}
    return TokenizedSet(
        data.tokens[kept],
        mask[kept],
        np.concatenate([[0], np.cumsum(data.lengths[whole])]).astype(np.int64),
        rows,
        {**data.summary, **counts},
        roles=data.roles,
        labels=np.stack([labels[int(row)] for row in rows]) if len(rows) else np.zeros((0, 1), np.int32),
    )


def _find_lists(values: list[list[Any]], problem_type: str) -> Labels:
    flat = [one for value in values for one in value]
    if any(isinstance(one, str) for one in flat):
        return Labels(MULTI, tuple(sorted({str(_plain(one)) for one in flat})))
    width = len(values[0])
    if not width or any(len(value) != width for value in values) or None in map(_number, flat):
        raise UserError("'labels' must be lists of names, or of finite numbers, equally many in each row")
    if problem_type == SINGLE and width == 1:
        return find_labels([{"label": value[0]} for value in values], problem_type)
    is_shares = width > 1 and all(0 <= _number(one) <= 1 for one in flat)
    kind = problem_type if problem_type in (MULTI, REGRESSION) else MULTI if is_shares else REGRESSION
    return Labels(kind, _numbered(width))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))


def _value(row: Mapping[str, Any]) -> Any:
    """Return what a row is labelled with, None where it is not; a list inside CSV is JSON."""
    for key in KEYS:
        value = row.get(key)
        if isinstance(value, list | tuple | np.ndarray):
            return list(value)
        if isinstance(value, str) and value.startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                return row[key]
        if isinstance(value, list) or holds_something(value) or (value is not None and not isinstance(value, str)):
            return None if isinstance(value, float) and math.isnan(value) else value
    return None


def _plain(value: Any) -> Any:
    """Return a whole number as an int: pandas writes classes as floats where a cell is empty."""
    return int(value) if isinstance(value, bool | float) and float(value).is_integer() else value


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    is_point = isinstance(value, str) and "." in value
    return int(number) if number is not None and number.is_integer() and not is_point else None
