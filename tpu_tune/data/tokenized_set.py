"""Tokenized examples in flat form: the tokens of all examples one after the other, a loss mask and offsets beside them.

That is what packing reads and what the cache stores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What an example is to an objective: nothing but itself, the better answer of two (or a desirable one), or the worse.
PLAIN, CHOSEN, REJECTED = 0, 1, 2
MISMATCHED = 3  # not in files: a prompt with another row's answer, see `preference_rows`


@dataclass
class TokenizedSet:
    """Examples in flat form.

    Attributes:
      tokens: (total,) int32, the examples one after the other. From an Arrow file both are `arrow.Values`, which are
        read as they are sliced.
      loss_mask: (total,) bool, the tokens to be predicted.
      offsets: (examples + 1,) int64; example i is tokens[offsets[i]:offsets[i + 1]].
      source_rows: (examples,) int64, the row that each example was made from (a long text makes several).
      summary: counts of rows (also by format), examples, tokens, target tokens, and of what was cut, dropped, bad or
        unused, by reason.
      labels: what a classification is to say of each example: (examples, 1) int32, its class, or (examples, labels)
        float32 (see `labels.Labels`); None where there is none.
      targets: (examples,) int64, tokens to be predicted of each example, where they have been counted already.
      roles: (examples,) int8, `PLAIN`, `CHOSEN` or `REJECTED`; None where all are plain. Two answers to one prompt are
        consecutive examples of one row, the chosen one first, each with the whole prompt before it.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    source_rows: np.ndarray
    summary: dict[str, Any]
    targets: np.ndarray | None = None
    labels: np.ndarray | None = None
    roles: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (examples,) int64."""
        return np.diff(self.offsets)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens before the first to be predicted of each example, (examples,) int64; every example has one."""
        marked = np.flatnonzero(self.loss_mask[:])
        return marked[np.searchsorted(marked, self.offsets[:-1])] - self.offsets[:-1]

    def count_targets(self) -> np.ndarray:
        """Tokens to be predicted of each example, (examples,) int64."""
        if self.targets is None:
            self.targets = np.zeros(0, np.int64)
            if len(self):  # no example is empty
                self.targets = np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64)
        return self.targets


def merge(sets: Sequence[TokenizedSet]) -> TokenizedSet:
    """Join the sets of consecutive rows into one; counts add up."""
    if len(sets) == 1:
        return sets[0]
    starts = np.cumsum([0, *(len(one.tokens) for one in sets)])
    offsets = [one.offsets[:-1] + start for one, start in zip(sets, starts, strict=False)]
    summary: dict[str, Any] = {}
    for key in sets[0].summary:
        values = [one.summary[key] for one in sets]
        if key in ("formats", "dropped", "unused"):
            summary[key] = dict(sorted(sum((Counter(value) for value in values), Counter()).items()))
        elif key == "bad_examples":
            summary[key] = [text for value in values for text in value][:5]
        else:
            summary[key] = max(values) if key == "max_token_id" else sum(values)
    roles = None
    if any(one.roles is not None for one in sets):
        roles = np.concatenate([np.zeros(len(one), np.int8) if one.roles is None else one.roles for one in sets])
    return TokenizedSet(
        np.concatenate([one.tokens for one in sets]),
        np.concatenate([one.loss_mask for one in sets]),
        np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
        np.concatenate([one.source_rows for one in sets]),
        summary,
        labels=None if sets[0].labels is None else np.concatenate([one.labels for one in sets]),
        roles=roles,
    )
