"""Generation with a key-value cache: greedy, temperature, top-k, top-p; batches of prompts of any length.

Prompts are padded on the left to a common length, so that all rows write their next token at one position; padding is
segment 0, which no token sees, and positions count from each prompt's first token. An encoder-decoder reads its
prompts in the encoder and answers from its start token. `start` reads the prompts and `_go_on` is the loop over
tokens, one jitted function each; the loop stops when every row has ended, or for `stream_ids` after every few tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpu_tune.checkpoints.ends import closing_ids, end_ids
from tpu_tune.checkpoints.template_limits import template_errors
from tpu_tune.checkpoints.tokenizers import encode_text
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, Cache, Decoder, Execution, check_length, empty_cache, encode

_ROUND = 32  # lengths are rounded up to multiples of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
      max_new_tokens: most tokens of an answer.
      temperature: 0 is greedy.
      top_k: only the k likeliest; 0 for all.
      top_p: only the likeliest that together reach this probability (nucleus sampling, arXiv:1904.09751).
      seed: the seed of the random choices.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens} must be at least 1, temperature={self.temperature} and "
                f"top_k={self.top_k} at least 0, top_p={self.top_p} above 0 and at most 1"
            )


def generate(
    arch: Architecture,
    params: dict[str, Any],
    tokenizer: Any,
    dtype: Any,
    encoded: Sequence[list[int]],
    sampling: Sampling,
    ends: Sequence[int],
) -> list[str]:
    """Return one decoded answer a prompt (see `Model.generate`).

    Args:
      arch, params, tokenizer, dtype: the model.
      encoded: each prompt's ids, of `encode_prompt`.
      sampling: how tokens are chosen.
      ends: ids that end an answer.
    """
    # An encoder-decoder's prompt is what its encoder reads; EOS ends it, as in training.
    if arch.encoder and tokenizer.eos_token_id is not None:
        end = tokenizer.eos_token_id
        encoded = [ids if ids[-1:] == [end] else [*ids, end] for ids in encoded]
    answers = generate_ids(arch, params, encoded, sampling, ends, dtype)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def encode_prompt(
    tokenizer: Any, prompt: str, chat: bool, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Return a prompt's token ids, through the chat template or as training encodes a prompt.

    Args:
      tokenizer: the model's tokenizer.
      prompt: the user's words, or with `chat=False` plain text to go on from.
      chat: whether to put it into the chat template.
      template_kwargs: variables of the template (`data.chat_template_kwargs`).

    Raises:
      UserError: there is no template, or it refuses the prompt.
    """
    if not chat:
        return encode_text(tokenizer, prompt)
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}], template_kwargs)


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the token ids of a chat whose next message is the model's, through the chat template.

    Args:
      tokenizer: the model's tokenizer.
      messages: `role` and `content` of each.
      template_kwargs: variables of the template (`data.chat_template_kwargs`).

    Raises:
      UserError: there is no template, or it refuses the chat.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "this tokenizer has no chat template; use --no-chat (chat=False in Python) to go on from plain text"
        )
    with template_errors(tokenizer.chat_template, _refused):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=False,
            **(template_kwargs or {}),
        )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _refused(reason: str) -> UserError:
    return UserError(f"the chat template refuses the prompt ({reason}); --no-chat goes on from plain text")


def end_tokens(tokenizer: Any, source: WeightSource | None = None) -> tuple[int, ...]:
    """Return the ids that end an answer.

    These are what the model's config.json and generation_config.json name, the tokenizer's EOS, the token with which
    its chat template closes an answer, and the usual end-of-turn tokens that it knows.

    Args:
      tokenizer: the model's tokenizer.
      source: the opened model; None leaves its files out.

    Raises:
      UserError: one of the files cannot be read.
    """
    names = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>")
    vocabulary = tokenizer.get_added_vocab()
    ends = {vocabulary[name] for name in names if name in vocabulary} | closing_ids(tokenizer)
    ends |= {tokenizer.eos_token_id} - {None}
    return tuple(sorted(ends | (end_ids(source) if source is not None else set())))


def check_writes(arch: Architecture) -> None:
    """Refuse to let a model write that has a head for labels.

    Raises:
      UserError: it has one.
    """
    if arch.num_labels:
        raise UserError(
            "this model has a classification or reward head and writes nothing: tpu-tune eval measures it, and "
            "tpu_tune.load(...).classify(texts) gives its labels"
        )


def generate_ids(
    arch: Architecture,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Sequence[int],
    dtype: Any,
) -> list[list[int]]:
    """Return the new token ids of each prompt, up to and without the token that ended it.

    Args:
      arch, params: the model.
      prompts: token ids, at least one each.
      sampling: how tokens are chosen.
      ends: ids that end an answer.
      dtype: the dtype of activations and cache.

    Raises:
      UserError: an empty prompt, or more tokens than the model has positions for.
    """
    return (
        list(stream_ids(arch, params, prompts, sampling, ends, dtype, sampling.max_new_tokens))[-1] if prompts else []
    )


def stream_ids(
    arch: Architecture,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Sequence[int],
    dtype: Any,
    every: int,
) -> Iterator[list[list[int]]]:
    """Yield what `generate_ids` returns as it grows: after every `every` tokens, and at the end.

    Args: see `generate_ids`; at least one prompt.
    """
    check_writes(arch)
    if not all(prompts):
        raise UserError("a prompt is empty; generation needs at least one token to go on from")
    encoder, starts = None, prompts
    if arch.encoder:
        encoder, starts = padded(prompts), [[arch.start_token]] * len(prompts)
    check_length(arch, max(map(len, starts)) + sampling.max_new_tokens)
    steps = -(-sampling.max_new_tokens // _ROUND) * _ROUND
    choice = _Choice(
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k),
        jnp.float32(sampling.top_p),
        jax.random.key(sampling.seed),
        jnp.asarray(list(ends) or [-1], jnp.int32),
    )
    ids, real = padded(starts)
    state = start(arch, jnp.dtype(dtype), steps, params, ids, real, encoder)
    last = np.sum(real, axis=1, dtype=np.int32) - 1
    for written in range(every, sampling.max_new_tokens + every, every):
        limit = jnp.int32(min(written, sampling.max_new_tokens))
        state = _go_on(arch, jnp.dtype(dtype), params, state, last, limit, choice)
        yield [_answer(row, ends) for row in np.asarray(state.written)[:, : int(limit)]]
        if np.all(state.ended):
            return


def _answer(row: np.ndarray, ends: Sequence[int]) -> list[int]:
    """The tokens of a row before the first that ends it."""
    ended = np.flatnonzero(np.isin(row, list(ends)))
    return row[: ended[0] if len(ended) else None].tolist()


def padded(prompts: Sequence[Sequence[int]], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, width) ids, padded on the left, and 1 where a token is real; by default of a rounded width."""
    width = width or -(-max(len(prompt) for prompt in prompts) // _ROUND) * _ROUND
    ids = np.zeros((len(prompts), width), np.int32)
    real = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        real[row, width - len(prompt) :] = 1
    return ids, real


class _Choice(NamedTuple):
    """How tokens are chosen, as arrays: another value compiles nothing anew."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    key: Array
    ends: Int[Array, " E"]


class State(NamedTuple):
    """An answer so far: how many tokens, the next one's logits, the cache, the tokens, which rows have ended."""

    number: Int[Array, ""]
    logits: Float[Array, "B V"]
    cache: Cache
    written: Int[Array, "B steps"]
    ended: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start(
    arch: Architecture,
    dtype: Any,
    steps: int,
    params: dict[str, Any],
    ids: Int[Array, "B T"],
    real: Int[Array, "B T"],
    encoder: tuple[Int[Array, "B M"], Int[Array, "B M"]] | None,
) -> State:
    """Read the prompts; there is room for `steps` tokens behind them."""
    model = Decoder(arch, params, Execution(dtype))
    encoder_output = encode(arch, params, Execution(dtype), *encoder) if encoder else None
    batch, width = ids.shape
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    hidden, cache = model.hidden(ids, positions, real, empty_cache(arch, batch, width + steps, dtype), encoder_output)
    logits = model.logits(hidden[:, -1]).astype(jnp.float32)
    return State(jnp.int32(0), logits, cache, jnp.zeros((batch, steps), jnp.int32), jnp.zeros(batch, bool))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _go_on(
    arch: Architecture,
    dtype: Any,
    params: dict[str, Any],
    state: State,
    last: Int[Array, " B"],
    limit: Int[Array, ""],
    choice: _Choice,
) -> State:
    """Write tokens until there are `limit` of them or all rows have ended; `last`: position of each prompt's end."""
    model = Decoder(arch, params, Execution(dtype))

    def going(state: State) -> Bool[Array, ""]:
        return (state.number < limit) & ~jnp.all(state.ended)

    def one(state: State) -> State:
        number, logits, cache, written, ended = state
        token = choose(logits, *choice[:3], jax.random.fold_in(choice.key, number))
        written = written.at[:, number].set(token)
        ended |= jnp.any(token[:, None] == choice.ends, axis=1)
        position = last[:, None] + 1 + number
        hidden, cache = model.hidden(token[:, None], position, jnp.ones_like(position), cache)
        return State(number + 1, model.logits(hidden[:, -1]).astype(jnp.float32), cache, written, ended)

    return jax.lax.while_loop(going, one, state)


def choose(logits: Float[Array, "B V"], temperature: Array, top_k: Array, top_p: Array, key: Array) -> Int[Array, " B"]:
    """Choose one token a row: the likeliest at temperature 0, else a draw among those that top-k and top-p leave.

    Args:
      logits: of each row's next token, float32.
      temperature, top_k, top_p: see `Sampling`; one number each for all rows, or one a row (B,).
      key: one for all rows, or one a row: a row with its own draws what it would draw if it were alone.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p = (jnp.reshape(of_rows, (-1, 1)) for of_rows in (temperature, top_k, top_p))

    def drawn() -> Int[Array, " B"]:
        scaled = logits / jnp.maximum(temperature, 1e-6)
        ordered = jnp.sort(scaled, axis=-1)[:, ::-1]
        place = jnp.broadcast_to(jnp.clip(top_k, 1, logits.shape[-1]) - 1, (len(logits), 1))
        smallest = jnp.where(top_k > 0, jnp.take_along_axis(ordered, place, axis=-1), -jnp.inf)
        ordered = jnp.where(ordered < smallest, -jnp.inf, ordered)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the first token that reaches top_p stays
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        left = jnp.where(scaled < jnp.maximum(least, smallest), -jnp.inf, scaled)
        draw = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
        return draw(key, left).astype(jnp.int32)

    warm = temperature[:, 0] > 0
    return jnp.where(warm, jax.lax.cond(jnp.any(warm), drawn, lambda: greedy), greedy)  # sorting takes time
