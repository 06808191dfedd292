"""Causal self-attention of short rows in plain JAX, written out strip by strip: for what no kernel of a GPU can do.

A strip is some queries with all keys that they see (the backward pass: some keys with all queries that see them). Its
softmax is complete, so that no result is carried from block to block in float32, rescaled and added to, as `blockwise`
has to. Shapes are known, so nothing is cut out at run time, and fewer scores are computed only to be masked. The price
is a program that grows with the number of strips, and scores that grow with the row, hence `fits`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from tpu_tune.kernels.blockwise import delta_of, no_gradient
from tpu_tune.kernels.layout import TokenLayout, soft_cap, with_sinks
from tpu_tune.kernels.splash import RESULT

STRIP = 256  # tokens
LONGEST = 2048  # tokens of a row, whose strips hold twice the scores of a pair of blocks of `blockwise`
_NEVER = -1e30  # of a score; every query sees itself, beside which this has no weight


@dataclasses.dataclass(frozen=True)
class _Strips:
    """The static facts of one call: `window`, `scale` and `cap` as in `attention.attention`; tokens of row, strip."""

    window: int | None
    scale: float
    cap: float | None
    length: int
    size: int

    def starts(self) -> range:
        """Return the first token of each strip."""
        return range(0, self.length, self.size)

    def own(self, start: int) -> slice:
        """Return a strip's tokens."""
        return slice(start, min(start + self.size, self.length))

    def keys_of(self, start: int) -> slice:
        """Return the keys that a strip's queries see, a few more for the sake of even shapes."""
        first = 0 if self.window is None else max(0, start - self.window + 1) // 64 * 64
        return slice(first, self.own(start).stop)

    def queries_of(self, start: int) -> slice:
        """Return the queries that see a strip's keys."""
        last = self.length if self.window is None else self.own(start).stop + self.window - 1
        return slice(start, min(-(-last // 64) * 64, self.length))


def fits(length: int) -> bool:
    """Return whether rows of so many tokens are short enough."""
    return length <= LONGEST


def strips(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    layout: TokenLayout,
    window: int | None,
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    size: int = STRIP,
) -> Float[Array, "B T H D"]:
    """Return causal self-attention as `attention.reference` does; see there. `size`: tokens of a strip."""
    batch, length, heads, width = q.shape
    facts = _Strips(window, scale, cap, length, size)
    grouped = q.reshape(batch, length, k.shape[2], -1, width)
    out, normaliser = _attend(facts, grouped, k, v, (layout.query_index, layout.query_segments))
    normaliser = jnp.transpose(normaliser, (0, 3, 1, 2)).reshape(batch, length, heads)
    return with_sinks(out.reshape(q.shape), normaliser, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(facts: _Strips, q: Array, k: Array, v: Array, where: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the result (B, T, K, G, D), and the scores' log-sum-exp (B, K, G, T), float32."""
    outs, normalisers = [], []
    for start in facts.starts():
        queries, keys = facts.own(start), facts.keys_of(start)
        capped, limit = _scores(facts, q, k, where, queries, keys)
        scores = jnp.minimum(capped, limit)
        largest = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - largest[..., None])
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v[:, keys], preferred_element_type=jnp.float32)
        outs.append((out / jnp.moveaxis(total, 3, 1)[..., None]).astype(v.dtype))
        normalisers.append(largest + jnp.log(total))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(normalisers, axis=-1)


def _scores(
    facts: _Strips, q: Array, k: Array, where: tuple[Array, Array], queries: slice, keys: slice
) -> tuple[Array, Array]:
    """Return scores (B, K, G, queries, keys) before the mask, and the most that it allows, (B, 1, 1, queries, keys).

    A minimum, because `where` would choose from a constant as large as the scores, which a scan over layers makes once
    and reads in every layer, and cuBLAS would add a mask to its product after writing it out as large as that.
    """
    raw = jnp.einsum("btkgd,bskd->bkgts", q[:, queries], k[:, keys], preferred_element_type=jnp.float32) * facts.scale
    index, segments = where
    layout = TokenLayout(index[:, queries], index[:, keys], segments[:, queries], segments[:, keys])
    limit = jnp.where(layout.mask(facts.window), jnp.float32(jnp.inf), jnp.float32(_NEVER))
    return soft_cap(raw, facts.cap), limit[:, None, None]


def _forward(facts: _Strips, q: Array, k: Array, v: Array, where: tuple[Array, Array]) -> tuple[tuple, tuple]:
    out, normaliser = (checkpoint_name(part, RESULT) for part in _attend(facts, q, k, v, where))
    return (out, normaliser), (q, k, v, where, out, normaliser)


def _backward(facts: _Strips, residuals: tuple, gradients: tuple[Array, Array]) -> tuple:
    q, k, v, where, out, normaliser = residuals
    g, g_normaliser = gradients
    delta = delta_of(out, g, g_normaliser)
    to_q: list[list[Array]] = [[] for _ in facts.starts()]  # of each strip of queries, the parts that its keys give
    to_k, to_v = [], []
    for start in facts.starts():
        queries, keys = facts.queries_of(start), facts.own(start)
        capped, limit = _scores(facts, q, k, where, queries, keys)
        weights = jnp.exp(jnp.minimum(capped, limit) - normaliser[..., queries, None])
        slope = jnp.einsum("btkgd,bskd->bkgts", g[:, queries], v[:, keys], preferred_element_type=jnp.float32)
        slope = weights * (slope - delta[..., queries, None])
        if facts.cap is not None:
            slope *= 1 - (capped / facts.cap) ** 2
        slope = (slope * facts.scale).astype(q.dtype)
        multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        to_v.append(multiply("bkgts,btkgd->bskd", weights.astype(g.dtype), g[:, queries]).astype(v.dtype))
        to_k.append(multiply("bkgts,btkgd->bskd", slope, q[:, queries]).astype(k.dtype))
        more = multiply("bkgts,bskd->btkgd", slope, k[:, keys])
        for first in range(start, queries.stop, facts.size):
            to_q[first // facts.size].append(more[:, first - start : first - start + facts.size])
    joined = [jnp.concatenate(parts, axis=1) for parts in ([_sum(parts) for parts in to_q], to_k, to_v)]
    return joined[0].astype(q.dtype), joined[1], joined[2], no_gradient(where)


def _sum(parts: list[Array]) -> Array:
    """Add the parts up; under a window the last may be of fewer tokens."""
    longest = max(part.shape[1] for part in parts)
    short = [[(0, 0), (0, longest - part.shape[1]), *[(0, 0)] * (part.ndim - 2)] for part in parts]
    return functools.reduce(jnp.add, (jnp.pad(part, pad) for part, pad in zip(parts, short, strict=True)))


_attend.defvjp(_forward, _backward)
