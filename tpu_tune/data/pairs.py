"""Rows for an encoder-decoder: the input goes to the encoder, the output is the decoder's target.

The tokens are those that a decoder-only model would see (`tokenizing`): input, then output and EOS, with a mask over
the output. Here each example is cut where the mask begins. As T5 was trained, EOS ends what the encoder reads too, and
the decoder reads its targets moved by one behind a start token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpu_tune.data.loading import IGNORE
from tpu_tune.data.tokenizing import TokenizedSet
from tpu_tune.errors import UserError

_ROUND = 64  # widths are rounded up to multiples of this


@dataclass(frozen=True)
class EncoderDecoder:
    """What an encoder-decoder's rows need to know: the ids before its answers and behind its inputs (None: nothing)."""

    start_token: int
    end_token: int | None


@dataclass(frozen=True)
class PairRows:
    """One example a row, padded on the right.

    Attributes:
      data: tokens, loss mask and offsets of all examples.
      documents: (rows,) which examples these are, in order.
      cuts: (examples,) tokens of each example's input.
      encoder_width, width: tokens a row, of the encoder's and of the decoder's side.
      kind: the model's special tokens.
    """

    data: TokenizedSet
    documents: np.ndarray
    cuts: np.ndarray
    encoder_width: int
    width: int
    kind: EncoderDecoder

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
        end = [] if self.kind.end_token is None else [self.kind.end_token]
        for i, row in enumerate(indices):
            if row < 0:
                continue
            document = self.documents[row]
            first, last = self.data.offsets[document], self.data.offsets[document + 1]
            cut = first + self.cuts[document]
            source, target = [*self.data.tokens[first:cut], *end], self.data.tokens[cut:last]
            batch["encoder_ids"][i, : len(source)] = source
            batch["encoder_segment_ids"][i, : len(source)] = 1
            length = len(target)
            batch["input_ids"][i, :length] = [self.kind.start_token, *target[:-1]]
            batch["targets"][i, :length] = target
            batch["positions"][i, :length] = np.arange(length)
            batch["segment_ids"][i, :length] = 1
        return batch


def pair_rows(name: str, data: TokenizedSet, documents: np.ndarray, kind: EncoderDecoder) -> PairRows:
    """Cut examples into input and output; the widths are those of the longest of all.

    Args:
      name: of the data, for messages.
      data: all examples.
      documents: (n,) the ones to make rows of.
      kind: the model's special tokens.

    Raises:
      UserError: examples that are not pairs of an input and an output.
    """
    if data.summary["format"] in ("text", "messages", "sharegpt"):
        raise UserError(
            f"{name}: an encoder-decoder learns from rows with an input and an output, and these are "
            f"'{data.summary['format']}'; use input/output, prompt/completion or alpaca rows"
        )
    starts = np.flatnonzero(data.loss_mask)
    cuts = starts[np.searchsorted(starts, data.offsets[:-1])] - data.offsets[:-1]
    targets = data.lengths - cuts
    extra = kind.end_token is not None
    encoder_width, width = (
        -(-int(longest) // _ROUND) * _ROUND for longest in (np.max(cuts, initial=1) + extra, np.max(targets, initial=1))
    )
    return PairRows(data, documents, cuts, encoder_width, width, kind)
