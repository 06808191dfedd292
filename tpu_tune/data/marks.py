"""A tokenizer's marks of a text's beginning and end, and putting them where they are missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.data.tokenize_options import TokenizeOptions


@dataclass(frozen=True)
class Marks:
    """The tokenizer's special tokens, and whether it puts BOS before a text by itself."""

    bos: str
    bos_id: int | None
    eos: str
    eos_id: int | None
    adds_bos: bool
    closing_ids: frozenset[int]


def read_marks(tokenizer: Any) -> Marks:
    """Read a tokenizer's marks; the call also takes out the truncation that an earlier one has left in it."""
    from tpu_tune.checkpoints.tokenizers import adds_bos  # which imports jax, for reading data alone

    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    closing = frozenset(tokenizer.added_tokens_encoder.values()) | ({eos_id} - {None})
    # A missing token is None, which would otherwise become the word "None" when strings are joined.
    return Marks(tokenizer.bos_token or "", bos_id, tokenizer.eos_token or "", eos_id, adds_bos(tokenizer), closing)


def missing_ends(target: str, marks: Marks, options: TokenizeOptions) -> int:
    """How many EOS an answer lacks; it may end in some already, as unsloth's notebooks write it."""
    there = 0
    while marks.eos and there < options.num_eos and target.endswith(marks.eos):
        target, there = target.removesuffix(marks.eos), there + 1
    return options.num_eos - there


def with_bos(ids: np.ndarray, marks: Marks) -> np.ndarray:
    """Put BOS before a text's ids where the tokenizer adds it; one that is there already is enough."""
    if not marks.adds_bos or ids[:1].tolist() == [marks.bos_id]:
        return ids
    return np.concatenate([np.asarray([marks.bos_id], np.int32), ids])
