"""Rows of answers to judge: what belongs together stands in one row.

A pair's chosen and rejected answer are two documents of one row, the chosen first. Single answers (KTO) each have a
second document behind them where there is room for it: their prompt with another row's answer, from which the objective
estimates how far the model has moved from its reference. What is packed is such a unit of two documents.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tpu_tune.data.loading import PackedRows
from tpu_tune.data.packing import one_per_row, pack
from tpu_tune.data.tokenized_set import MISMATCHED, TokenizedSet


def preference_rows(
    data: TokenizedSet, examples: np.ndarray, width: int, packing: bool, group: int | None
) -> PackedRows:
    """Pack pairs, or single answers with their mismatched ones.

    Args:
      data: all examples.
      examples: (n,) the ones to use, in order.
      width: most tokens a row; no pair has more, nor a single answer.
      packing: several units a row; otherwise one, and rows as wide as the longest.
      group: consecutive single answers among which answers are exchanged; 0: none are. None: these are pairs.
    """
    if group is None:
        units = examples.reshape(-1, 2)
    elif group:
        data, units = with_mismatched(data, examples, width, group)
    else:
        units = np.stack([examples, np.full(len(examples), -1)], axis=1)
    lengths = np.where(units >= 0, data.lengths[units], 0).sum(axis=1)
    packed = pack(lengths, width) if packing else one_per_row(lengths, width)
    held = units[packed.documents]
    counts = np.concatenate([[0], np.cumsum(np.count_nonzero(held >= 0, axis=1))])
    packed = dataclasses.replace(packed, documents=held[held >= 0], offsets=counts[packed.offsets])
    slots = int(np.max(np.diff(packed.offsets), initial=2))
    return PackedRows(data, packed, slots + slots % 2)


def with_mismatched(
    data: TokenizedSet, examples: np.ndarray, width: int, group: int
) -> tuple[TokenizedSet, np.ndarray]:
    """Add to single answers their prompts with another's answer.

    As in TRL, in each `group` of consecutive rows the answers are moved on by one, the last one to the first prompt.
    What goes beyond `width` together with the row's own answer is cut; without room for a token of the answer there is
    none.

    Returns:
      The set with the new examples (role `MISMATCHED`) behind the others, and (n, 2) an example and its new one, -1
      where there is none.
    """
    cut = data.prompt_lengths
    places = np.arange(len(examples))
    first = places - places % group
    last = np.minimum(first + group, len(examples)) - 1
    others = examples[np.where(places == first, last, places - 1)]
    tokens, masks, units, count = [], [], np.full((len(examples), 2), -1, np.int64), len(data)
    units[:, 0] = examples
    for place, (own, other) in enumerate(zip(examples, others, strict=True)):
        begin, end = data.offsets[own], data.offsets[own + 1]
        prompt = data.tokens[begin : begin + cut[own]]
        answer = data.tokens[data.offsets[other] + cut[other] : data.offsets[other + 1]]
        answer = answer[: max(0, width - int(end - begin) - len(prompt))]
        if len(answer):
            tokens.append(np.concatenate([prompt, answer]))
            masks.append(np.arange(len(prompt) + len(answer)) >= len(prompt))
            units[place, 1] = count
            count += 1
    made = units[units[:, 1] >= 0, 0]
    offsets = data.offsets[-1] + np.cumsum([len(one) for one in tokens], dtype=np.int64)
    return TokenizedSet(
        np.concatenate([data.tokens[:], *tokens]),
        np.concatenate([data.loss_mask[:], *masks]),
        np.concatenate([data.offsets, offsets]),
        np.concatenate([data.source_rows, data.source_rows[made]]),
        data.summary,
        roles=np.concatenate([data.roles, np.full(len(made), MISMATCHED, np.int8)]),
    ), units
