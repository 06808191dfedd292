"""Rows for an encoder-decoder: the input goes to the encoder, the output is the decoder's target.

`tokenizing` makes each example one run of tokens: the input and EOS, then the output and EOS, with a mask over the
output. This module cuts it where the mask begins. The decoder reads its targets shifted right behind a start token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpu_tune.data.loading import IGNORE
from tpu_tune.data.packing import one_per_row
from tpu_tune.data.tokenized_set import TokenizedSet


@dataclass(frozen=True)
class PairRows:
    """One example a row, padded on the right.

    Attributes:
      data: tokens, loss mask and offsets of all examples.
      documents: (rows,) the example of each row.
      input_lengths: (examples,) tokens of each example's input, EOS included.
      encoder_width, width: tokens a row, of the encoder's and of the decoder's side.
      start_token: id before the first token of an answer.
    """

    data: TokenizedSet
    documents: np.ndarray
    input_lengths: np.ndarray
    encoder_width: int
    width: int
    start_token: int

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def capacity(self) -> int:
        """Tokens that all rows have room for, both sides together."""
        return len(self) * (self.encoder_width + self.width)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make rows.

        Args:
          indices: (n,) row numbers; -1 gives an empty row.

        Returns:
          int32 arrays: `encoder_ids`, `encoder_segment_ids` (1 where a token is real), (n, encoder width); `input_ids`,
          `targets`, `positions`, `segment_ids` of the decoder, (n, width) as in `PackedRows.take`.
        """
        rows = len(indices)
        batch = {
            name: np.zeros((rows, self.encoder_width), np.int32) for name in ("encoder_ids", "encoder_segment_ids")
        }
        for name in ("input_ids", "positions", "segment_ids"):
            batch[name] = np.zeros((rows, self.width), np.int32)
        batch["targets"] = np.full((rows, self.width), IGNORE, np.int32)
        for i, row in enumerate(indices):
            if row < 0:
                continue
            document = self.documents[row]
            first, last = self.data.offsets[document], self.data.offsets[document + 1]
            cut = first + self.input_lengths[document]
            source, target = self.data.tokens[first:cut], self.data.tokens[cut:last]
            batch["encoder_ids"][i, : len(source)] = source
            batch["encoder_segment_ids"][i, : len(source)] = 1
            length = len(target)
            batch["input_ids"][i, :length] = [self.start_token, *target[:-1]]
            batch["targets"][i, :length] = target
            batch["positions"][i, :length] = np.arange(length)
            batch["segment_ids"][i, :length] = 1
        return batch


def pair_rows(data: TokenizedSet, documents: np.ndarray, max_length: int, start_token: int) -> PairRows:
    """Cut examples into input and output; the widths are those of the longest of all.

    Args:
      data: all examples, tokenized for an encoder-decoder.
      documents: (n,) the ones to make rows of.
      max_length: most tokens of either side; a width is otherwise rounded up, as in `one_per_row`.
      start_token: id before the first token of an answer.
    """
    input_lengths = data.prompt_lengths
    encoder_width, width = (
        one_per_row(lengths, max_length).width for lengths in (input_lengths, data.lengths - input_lengths)
    )
    return PairRows(data, documents, input_lengths, encoder_width, width, start_token)
