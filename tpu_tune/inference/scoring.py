"""Log-likelihoods: how likely a model finds the tokens it is shown.

A `Row` is what goes into the model and what is to be predicted at each position. `score` brings many rows through one
jitted function, sorted by length into a few widths, so that few shapes are compiled; logits exist for a chunk of the
positions with a target at one time only. Above it stand the pairs (context, continuation), the letters of a
multiple-choice question and the windows of a long text, cut as lm-evaluation-harness cuts them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model
from tpu_tune.kernels.cross_entropy import IGNORED, token_losses
from tpu_tune.models import Architecture, Decoder, Execution, check_length, encode

BATCH_TOKENS = 4096  # positions of all rows that go through the model together
_LOGITS_BYTES = 128 * 2**20  # float32 logits that exist at one time
_DEFAULT_LENGTH = 2048  # of a model whose config names no length


@dataclasses.dataclass(frozen=True)
class Row:
    """One text to score.

    Attributes:
      ids: the token ids that the model (or its decoder) reads, at least one.
      targets: as many ids: the token to be predicted at each position, `IGNORED` where none is.
      encoder: the ids that an encoder-decoder's encoder reads.
    """

    ids: Sequence[int]
    targets: Sequence[int]
    encoder: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Scores:
    """What came out, one entry a row.

    Attributes:
      log_likelihood: (rows,) float64, sum over the row's targets, in nats.
      num_targets: (rows,) how many there were.
      num_right: (rows,) first guesses that are right; all of them: greedy decoding writes the targets.
      first_logits: (rows, tokens) float32, logits of the tokens asked for, at the position of the row's first target.
    """

    log_likelihood: np.ndarray
    num_targets: np.ndarray
    num_right: np.ndarray
    first_logits: np.ndarray

    @property
    def is_greedy(self) -> np.ndarray:
        """(rows,) whether every first guess is right."""
        return self.num_right == self.num_targets


def max_length(model: Model) -> int:
    """Return the tokens a row may have: the positions that the model was made for."""
    return model.architecture.max_positions or _DEFAULT_LENGTH


def score(model: Model, rows: Sequence[Row], tokens: Sequence[int] = (), batch_tokens: int = BATCH_TOKENS) -> Scores:
    """Score rows, in any order of length.

    Args:
      model: the model to score with; its dtype is the activations', and logits are reduced in float32.
      rows: at least one target each.
      tokens: ids whose logits at each row's first target are returned.
      batch_tokens: positions of all rows in one pass; a row that is longer goes alone.

    Raises:
      UserError: a row without a target, or longer than the model has positions for.
    """
    count = len(rows)
    losses, right = np.zeros(count), np.zeros(count, np.int64)
    first = np.zeros((count, len(tokens)), np.float32)
    num_targets = np.array([sum(target != IGNORED for target in row.targets) for row in rows], np.int64)
    if count and not num_targets.all():
        raise UserError(f"text {int(np.argmin(num_targets)) + 1} to score has no token to predict")
    token_ids = jnp.asarray(list(tokens), jnp.int32)
    check_length(model.architecture, max((len(row.ids) for row in rows), default=0))
    for numbers, batch in _batches(rows, num_targets, batch_tokens):
        shape = batch["positions"].shape
        chunk = max(1, _LOGITS_BYTES // (4 * model.architecture.vocab_size * shape[0]))
        row_losses, row_right, first_logits = jax.device_get(
            _score(model.architecture, model.dtype, min(chunk, shape[1]), model.params, batch, token_ids)
        )
        losses[numbers], right[numbers] = row_losses[: len(numbers)], row_right[: len(numbers)]
        first[numbers] = first_logits[: len(numbers)]
    return Scores(-losses, num_targets, right, first)


def continuation_row(model: Model, context: Sequence[int], continuation: Sequence[int]) -> Row:
    """Return the row that scores `continuation` after `context`; what does not fit is cut off at the left.

    An encoder-decoder reads the context in its encoder.
    """
    arch, longest = model.architecture, max_length(model)
    if arch.encoder:
        return Row([arch.start_token, *continuation[:-1]], list(continuation), list(context))
    ids = [*context, *continuation][-(longest + 1) :]
    num_targets = min(len(continuation), len(ids) - 1)
    return Row(ids[:-1], [IGNORED] * (len(ids) - 1 - num_targets) + ids[len(ids) - num_targets :])


def encode_continuation(model: Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation, as lm-evaluation-harness parts them.

    Blanks at the context's end belong to the continuation's first token; both are tokenized together and parted at the
    context's length (an encoder-decoder's apart). An empty context is the start of a text: BOS, or EOS without one.
    """
    tokenizer = model.tokenizer
    kept = context.rstrip()
    if not context:
        ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        start = start_token(tokenizer)
        return ([start], ids) if ids[:1] != [start] else (ids[:1], ids[1:])
    continuation = context[len(kept) :] + continuation
    before = model.encode_prompt(kept)
    if model.architecture.encoder:
        return before, list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    return before, model.encode_prompt(kept + continuation)[len(before) :]


def start_token(tokenizer: Any) -> int:
    """Return the id that stands before a text that has no context: BOS, or EOS where there is none.

    Raises:
      UserError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has neither a start nor an end token to begin a text with")


def score_continuations(model: Model, pairs: Sequence[tuple[str, str]], batch_tokens: int = BATCH_TOKENS) -> Scores:
    """Score each (context, continuation); both are text.

    Raises:
      UserError: a continuation that comes to no token.
    """
    rows = []
    for context, continuation in pairs:
        before, after = encode_continuation(model, context, continuation)
        if not after:
            raise UserError(f"{continuation!r} comes to no token of its own after {context[-40:]!r}")
        rows.append(continuation_row(model, before or [start_token(model.tokenizer)], after))
    return score(model, rows, batch_tokens=batch_tokens)


def choice_logits(
    model: Model, prompts: Sequence[Sequence[int]], tokens: Sequence[int], batch_tokens: int = BATCH_TOKENS
) -> Float[np.ndarray, "N C"]:
    """Return the logits of `tokens` as the next one after each prompt of token ids; float32."""
    rows = [continuation_row(model, prompt, [tokens[0]]) for prompt in prompts]
    return score(model, rows, tokens, batch_tokens).first_logits


def rolling_rows(model: Model, ids: Sequence[int]) -> list[Row]:
    """Return the windows that score a whole text: each token once, with as much before it as a window holds.

    The first window begins with the start token; the last one is as long as the others and scores what is left
    (lm-evaluation-harness' windows, context_len=1).
    """
    longest, start = max_length(model), start_token(model.tokenizer)
    if model.architecture.encoder:
        raise UserError("an encoder-decoder reads no text by itself; score its answers instead")
    ids = list(ids)
    first = ids[:longest]
    rows = [Row([start, *first[:-1]], first)] if ids else []
    done = len(first)
    while done < len(ids):
        num_targets = min(longest, len(ids) - done)
        end = done + num_targets
        window = ids[max(0, end - longest - 1) : end]
        context = [IGNORED] * (len(window) - 1 - num_targets)
        rows.append(Row(window[:-1], context + window[len(window) - num_targets :]))
        done = end
    return rows


def _size(length: int, least: int) -> int:
    """Round up to one of few sizes: a power of two, or one and a half of it."""
    size = least
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def _batches(
    rows: Sequence[Row], num_targets: np.ndarray, batch_tokens: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Yield (row numbers, arrays); all batches of one width have one shape, and empty rows fill the last of them."""
    widths: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        widths.setdefault((_size(len(row.ids), 32), _size(max(1, len(row.encoder)), 32)), []).append(number)
    for (width, encoder_width), members in sorted(
        widths.items(), reverse=True
    ):  # the largest first: if it fits, all do
        most_targets = _size(int(num_targets[members].max()), 8)
        size = min(max(1, batch_tokens // max(width, encoder_width)), max(8, 1 << (len(members) - 1).bit_length()))
        for start in range(0, len(members), size):
            numbers = members[start : start + size]
            yield numbers, _arrays([rows[number] for number in numbers], size, width, encoder_width, most_targets)


def _arrays(rows: Sequence[Row], size: int, width: int, encoder_width: int, most_targets: int) -> dict[str, np.ndarray]:
    """Return `ids` (B, T), `positions` (B, K) and the `targets` (B, K) there, `encoder` and `real` (B, M) each."""
    ids = np.zeros((size, width), np.int32)
    positions = np.zeros((size, most_targets), np.int32)
    targets = np.full((size, most_targets), IGNORED, np.int32)
    encoder, real = np.zeros((size, encoder_width), np.int32), np.zeros((size, encoder_width), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        row_targets = np.asarray(row.targets, np.int32)
        at = np.flatnonzero(row_targets != IGNORED)
        positions[i, : len(at)], targets[i, : len(at)] = at, row_targets[at]
        encoder[i, : len(row.encoder)], real[i, : len(row.encoder)] = row.encoder, 1
    return {"ids": ids, "positions": positions, "targets": targets, "encoder": encoder, "real": real}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    arch: Architecture,
    dtype: Any,
    chunk: int,
    params: dict[str, Any],
    batch: dict[str, Array],
    tokens: Int[Array, " C"],
) -> tuple[Float[Array, " B"], Int[Array, " B"], Float[Array, "B C"]]:
    encoder_output = encode(arch, params, Execution(dtype), batch["encoder"], batch["real"]) if arch.encoder else None
    # Padding stands behind every real token, where nothing that is causal looks.
    model = Decoder(arch, params, Execution(dtype))
    hidden, _ = model.hidden(batch["ids"], encoder_output=encoder_output)
    hidden = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
    first = model.logits(hidden[:, 0]).astype(jnp.float32)[:, tokens]
    short = -batch["positions"].shape[1] % chunk
    hidden = jnp.pad(hidden, [(0, 0), (0, short), (0, 0)]).reshape(len(hidden), -1, chunk, hidden.shape[-1])
    targets = jnp.pad(batch["targets"], [(0, 0), (0, short)], constant_values=IGNORED).reshape(*hidden.shape[:3])

    def one_chunk(hidden_and_targets: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = hidden_and_targets
        losses, right = token_losses(model.logits(hidden), targets)
        return jnp.sum(losses, axis=1), jnp.sum(right, axis=1)

    losses, right = jax.lax.map(one_chunk, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)))
    return jnp.sum(losses, axis=0), jnp.sum(right, axis=0), first
