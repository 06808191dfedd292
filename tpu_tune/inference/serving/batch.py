"""A running batch on the device: answers that begin and end at different times and are written together.

Shapes are static: rows and columns of the cache grow in the steps of `size`, prompts are read at widths of these steps,
and so few functions are compiled. A row draws with a key of its own, so that its answer does not depend on its
neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpu_tune.inference.generation import Sampling, State, choose, padded, start
from tpu_tune.models import Architecture, Cache, Decoder, Execution, empty_cache, grown, moved, put_row

EVERY = 4  # tokens between two looks at who has come and who has left
TOPS = 20  # most alternatives of a token whose log-probabilities may be asked for


class Settings(NamedTuple):
    """How each row's tokens are chosen, and how many it may still write (0: nobody's row)."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    key: Array
    left: Int[Array, " B"]


class Batch(NamedTuple):
    """The rows: their cache, next logits, next position, tokens written so far, and settings."""

    cache: Cache
    logits: Float[Array, "B V"]
    position: Int[Array, " B"]
    number: Int[Array, " B"]
    settings: Settings


class Written(NamedTuple):
    """New tokens, -1 where a row wrote none; with `tops` their log-probabilities and those of the likeliest."""

    tokens: Int[Array, "B K"]
    logprobs: Float[Array, "B K"]
    top_tokens: Int[Array, "B K N"]
    top_logprobs: Float[Array, "B K N"]


def size(least: int, step: int = 2, smallest: int = 1) -> int:
    """Return the smallest of `smallest`, `smallest * step`, `smallest * step**2`, ... that is at least `least`."""
    found = smallest
    while found < least:
        found *= step
    return found


def empty_batch(arch: Architecture, dtype: Any, rows: int, columns: int) -> Batch:
    """Return a batch in which no row is anybody's."""
    zeros = jnp.zeros(rows, jnp.int32)
    settings = Settings(
        jnp.zeros(rows), zeros, jnp.ones(rows), jax.random.split(jax.random.key(0), rows), jnp.zeros_like(zeros)
    )
    logits = jnp.zeros((rows, arch.vocab_size), jnp.float32)
    cache = empty_cache(arch, rows, columns, dtype)
    return Batch(cache, logits, jnp.zeros_like(zeros), jnp.zeros_like(zeros), settings)


def read_prompt(arch: Architecture, dtype: Any, params: dict[str, Any], prompt: Sequence[int], width: int) -> State:
    """Read a prompt into a cache of its own, `width` columns wide."""
    ids, real = padded([prompt], width)
    return start(arch, jnp.dtype(dtype), 0, params, ids, real, None)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _join(arch: Architecture, batch: Batch, row: Array, new: State, position: Array, settings: Settings) -> Batch:
    at_row = lambda old, its: old.at[row].set(its)  # noqa: E731
    return Batch(
        put_row(arch, batch.cache, row, new.cache),
        batch.logits.at[row].set(new.logits[0]),
        batch.position.at[row].set(position),
        batch.number.at[row].set(0),
        Settings(*map(at_row, batch.settings, settings)),
    )


def join(arch: Architecture, batch: Batch, row: int, new: State, prompt: Sequence[int], sampling: Sampling) -> Batch:
    """Return the batch with what `read_prompt` gave for `prompt` in a row; at least its width of columns is used."""
    settings = Settings(
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k),
        jnp.float32(sampling.top_p),
        jax.random.key(sampling.seed),
        jnp.int32(sampling.max_new_tokens),
    )
    return _join(arch, batch, jnp.int32(row), new, jnp.int32(len(prompt)), settings)


@functools.partial(jax.jit, donate_argnums=0)
def leave(batch: Batch, row: Int[Array, ""]) -> Batch:
    """Return the batch with a row that writes no more."""
    return batch._replace(settings=batch.settings._replace(left=batch.settings.left.at[row].set(0)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def move(arch: Architecture, batch: Batch, by: Int[Array, ""]) -> Batch:
    """Return the batch with its columns moved (see `cache_rows.moved`)."""
    return batch._replace(cache=moved(arch, batch.cache, by))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def grow(arch: Architecture, batch: Batch, rows: int, columns: int) -> Batch:
    """Return the batch with room for more."""
    more = rows - len(batch.position)
    settings = [jnp.concatenate([part, jnp.broadcast_to(part[:1], (more,))]) for part in batch.settings]
    settings[-1] = jnp.pad(batch.settings.left, (0, more))
    return Batch(
        grown(arch, batch.cache, rows, columns),
        jnp.pad(batch.logits, [(0, more), (0, 0)]),
        jnp.pad(batch.position, (0, more)),
        jnp.pad(batch.number, (0, more)),
        Settings(*settings),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def write(
    arch: Architecture,
    dtype: Any,
    tops: int,
    params: dict[str, Any],
    batch: Batch,
    steps: Int[Array, ""],
    ends: Int[Array, " E"],
) -> tuple[Batch, Written]:
    """Write up to `steps` tokens a row, at most EVERY.

    Args:
      arch, dtype, params: the model.
      tops: log-probabilities of so many of the likeliest tokens come with each; 0: none, its own neither.
      batch: the rows; there is room for `steps` more columns.
      steps: how many tokens.
      ends: ids that end an answer; such a token is still written.
    """
    model, rows = Decoder(arch, params, Execution(dtype)), len(batch.position)
    none = Written(
        jnp.full((rows, EVERY), -1, jnp.int32),
        jnp.zeros((rows, EVERY)),
        jnp.zeros((rows, EVERY, tops), jnp.int32),
        jnp.zeros((rows, EVERY, tops)),
    )

    def going(carry: tuple[Array, Batch, Written]) -> Array:
        return (carry[0] < steps) & jnp.any(carry[1].settings.left > 0)

    def one(carry: tuple[Array, Batch, Written]) -> tuple[Array, Batch, Written]:
        done, (cache, logits, position, number, settings), written = carry
        keys = jax.vmap(jax.random.fold_in)(settings.key, number)
        token = choose(logits, settings.temperature, settings.top_k, settings.top_p, keys)
        active = settings.left > 0
        ended = jnp.any(token[:, None] == ends, axis=1)
        left = jnp.where(active & ~ended, settings.left - 1, 0)
        written = written._replace(tokens=written.tokens.at[:, done].set(jnp.where(active, token, -1)))
        if tops:
            written = _with_logprobs(written, done, logits, token, tops)
        goes_on = (left > 0).astype(jnp.int32)
        hidden, cache = model.hidden(token[:, None], position[:, None], goes_on[:, None], cache)
        logits = model.logits(hidden[:, -1]).astype(jnp.float32)
        return done + 1, Batch(cache, logits, position + 1, number + 1, settings._replace(left=left)), written

    _, batch, written = jax.lax.while_loop(going, one, (jnp.int32(0), batch, none))
    return batch, written


def _with_logprobs(written: Written, done: Array, logits: Array, token: Array, tops: int) -> Written:
    everyone = jax.nn.log_softmax(logits, axis=-1)
    best, which = jax.lax.top_k(everyone, tops)
    return Written(
        written.tokens,
        written.logprobs.at[:, done].set(jnp.take_along_axis(everyone, token[:, None], axis=1)[:, 0]),
        written.top_tokens.at[:, done].set(which),
        written.top_logprobs.at[:, done].set(best),
    )


def on_host(written: Written) -> Written:
    """Return it as NumPy arrays; waits for the device."""
    return Written(*map(np.asarray, written))
