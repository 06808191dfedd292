"""Attention over blocks of queries and keys in plain JAX, with memory linear in the sequence (FlashAttention).

The forward pass keeps a running maximum and sum for each query, so that scores exist for one pair of blocks at a time;
what it keeps for the backward pass is the result and one number a query, from which each block's weights are computed
again (Dao 2023, arXiv:2307.08691, algorithms 1 and 2). Blocks that the causal mask or the window leaves empty are not
visited where queries and keys are the same row. It runs on every device: older TPUs, GPUs, CPUs. `sequence.py` calls
the two passes for queries and keys that are different parts of one row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpu_tune.kernels.layout import TokenLayout, soft_cap, with_sinks

BLOCK = 512
_NEVER = -1e30  # finite: a query that sees no key must give zeros, not NaN


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The static facts of one call.

    Attributes:
      window, scale, cap: settings of the mask and the scores, as in `attention.attention`.
      size: number of tokens in a block.
      queries, keys: number of blocks of queries, and of keys.
      causal: whether keys behind the query are hidden from it.
      aligned: whether queries and keys are parts of one row, so that their indices tell which blocks may be skipped.
    """

    window: int | None
    scale: float
    cap: float | None
    size: int
    queries: int
    keys: int
    causal: bool
    aligned: bool

    def keys_of(self, query: Array, offset: Array | int) -> tuple[Array, Array]:
        """Return the first key block that a query block needs, and the one behind the last.

        Args:
          query: index of the query block.
          offset: index of the first query in the row, minus that of the first key.
        """
        if not self.aligned:
            return jnp.int32(0), jnp.int32(self.keys)
        first, start = jnp.int32(0), query * self.size + offset
        if self.window is not None:
            first = jnp.clip((start - self.window + 1) // self.size, 0, self.keys)
        return first, jnp.clip((start + self.size - 1) // self.size + 1, 0, self.keys)

    def queries_of(self, key: Array, offset: Array | int) -> tuple[Array, Array]:
        """Return the first query block that needs a key block, and the one behind the last."""
        if not self.aligned:
            return jnp.int32(0), jnp.int32(self.queries)
        last, start = jnp.int32(self.queries), key * self.size - offset
        if self.window is not None:
            last = jnp.clip((start + self.size + self.window - 2) // self.size + 1, 0, self.queries)
        return jnp.clip(start // self.size, 0, self.queries), last


def blockwise(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    layout: TokenLayout,
    window: int | None,
    scale: float,
    block: int = BLOCK,
    cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H D"]:
    """Return attention as `attention.reference` does; see there for the arguments. `block`: tokens in a block."""
    length = q.shape[1]
    # Self-attention without a cache: an index is the position in the row, so that block numbers tell which are visible.
    aligned = layout.causal and length == k.shape[1]
    blocks, cut_up = in_blocks(q, k, v, layout, window, scale, cap, block, aligned)
    return with_sinks(*joined(*_flash(blocks, *cut_up), length), sinks)


def in_blocks(
    q: Array,
    k: Array,
    v: Array,
    layout: TokenLayout,
    window: int | None,
    scale: float,
    cap: float | None,
    block: int,
    aligned: bool,
) -> tuple[Blocks, tuple[Array, Array, Array, tuple[Array, ...]]]:
    """Cut attention's arguments into blocks, for `forward` and `backward`.

    Returns:
      The static facts, and (q (blocks, B, block, K, G, D), k and v (blocks, B, block, K, D), (index and segments of
      queries, of keys, (blocks, B, block) each)).
    """
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    block = min(block, max(length, k.shape[1]))
    q = q.reshape(batch, length, groups, heads // groups, size)

    def cut(x: Array, fill: int = 0) -> Array:
        """(B, N, ...) -> (blocks, B, block, ...); what fills the last block is a segment that nothing else has."""
        short = -x.shape[1] % block
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    where = (
        cut(layout.query_index),
        cut(layout.query_segments, -1),
        cut(layout.key_index),
        cut(layout.key_segments, -2),
    )
    q, k, v = cut(q), cut(k), cut(v)
    return Blocks(window, scale, cap, block, q.shape[0], k.shape[0], layout.causal, aligned), (q, k, v, where)


def joined(out: Array, normaliser: Array, length: int) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """Put what `forward` returns in blocks together again: rows of `length` tokens."""
    batch, size = out.shape[1], out.shape[-1]
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, out.shape[3] * out.shape[4], size)
    normaliser = jnp.transpose(normaliser, (1, 0, 4, 2, 3)).reshape(out.shape[:3])
    return out[:, :length], normaliser[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(blocks: Blocks, q: Array, k: Array, v: Array, where: tuple[Array, ...]) -> tuple[Array, Array]:
    return forward(blocks, q, k, v, where, v.dtype)


def _scores(blocks: Blocks, q: Array, k: Array, where: tuple[Array, ...]) -> tuple[Array, Array]:
    """Return (scores before the mask, mask) of one pair of blocks, (B, K, G, block, block)."""
    raw = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * blocks.scale
    visible = TokenLayout(where[0], where[2], where[1], where[3], blocks.causal).mask(blocks.window)
    return raw, visible[:, None, None]


def _at(parts: tuple[Array, ...], number: Array) -> list[Array]:
    return [jax.lax.dynamic_index_in_dim(part, number, keepdims=False) for part in parts]


def forward(
    blocks: Blocks, q: Array, k: Array, v: Array, where: tuple[Array, ...], dtype: Any, offset: Array | int = 0
) -> tuple[Array, Array]:
    """Return the result (blocks, B, block, K, G, D) in `dtype`, and the scores' log-sum-exp (blocks, B, K, G, block).

    The latter is float32, and about -1e30 where a query sees no key. See `in_blocks` for the arguments.
    """

    def one_query_block(_: None, scanned: tuple) -> tuple[None, tuple[Array, Array]]:
        number, queries, index, segments = scanned

        def add(key: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, out = carry
            keys, values, key_index, key_segments = _at((k, v, *where[2:]), key)
            raw, visible = _scores(blocks, queries, keys, (index, segments, key_index, key_segments))
            scores = jnp.where(visible, soft_cap(raw, blocks.cap), _NEVER)
            new = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(largest - new)
            part = jnp.einsum(
                "bkgts,bskd->bkgtd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
            )
            return new, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + part

        shape = (queries.shape[0], *queries.shape[2:4], queries.shape[1])
        start = (jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.zeros((*shape, queries.shape[-1])))
        largest, total, out = jax.lax.fori_loop(*blocks.keys_of(number, offset), add, start)
        total = jnp.maximum(total, 1e-30)  # 0 where no block was visited
        out = jnp.moveaxis(out / total[..., None], 3, 1).astype(dtype)
        return None, (out, largest + jnp.log(total))

    _, results = jax.lax.scan(one_query_block, None, (jnp.arange(blocks.queries), q, *where[:2]))
    return results


def _flash_forward(
    blocks: Blocks, q: Array, k: Array, v: Array, where: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple]:
    out, normaliser = forward(blocks, q, k, v, where, v.dtype)
    return (out, normaliser), (q, k, v, where, out, normaliser)


def _flash_backward(blocks: Blocks, residuals: tuple, gradients: tuple[Array, Array]) -> tuple:
    q, k, v, where, out, normaliser = residuals
    to_q = jnp.zeros(q.shape, jnp.float32)
    delta = delta_of(out, *gradients)
    to_q, to_k, to_v = backward(blocks, q, k, v, where, gradients[0], normaliser, delta, to_q, k.dtype)
    return to_q.astype(q.dtype), to_k, to_v, no_gradient(where)


def delta_of(out: Array, g: Array, g_normaliser: Array) -> Array:
    """Return what the scores' derivative needs of each query.

    It is the product of its result and the result's gradient, minus the gradient of its log-sum-exp, whose derivative
    by a score is the softmax's weight.
    """
    return jnp.einsum("...tkgd,...tkgd->...kgt", out.astype(jnp.float32), g.astype(jnp.float32)) - g_normaliser


def no_gradient(where: tuple[Array, ...]) -> tuple[np.ndarray, ...]:
    """Return the cotangents of integers."""
    return tuple(np.zeros(part.shape, jax.dtypes.float0) for part in where)


def backward(
    blocks: Blocks,
    q: Array,
    k: Array,
    v: Array,
    where: tuple[Array, ...],
    g: Array,
    normaliser: Array,
    delta: Array,
    to_q: Array,
    dtype: Any,
    offset: Array | int = 0,
) -> tuple[Array, Array, Array]:
    """Return `to_q` (float32) with these keys' part added, and the gradients of k and v in `dtype`.

    Args:
      g: the result's gradient, cut into blocks as `q` is.
      normaliser: log-sum-exp of each query over all keys that it sees, here and elsewhere.
      delta: what `delta_of` returns.
    """

    def one_key_block(to_q: Array, scanned: tuple) -> tuple[Array, tuple[Array, Array]]:
        number, keys, values, key_index, key_segments = scanned

        def add(query: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            to_q, to_k, to_v = carry
            queries, back, norm, product, index, segments = _at((q, g, normaliser, delta, *where[:2]), query)
            raw, visible = _scores(blocks, queries, keys, (index, segments, key_index, key_segments))
            capped = soft_cap(raw, blocks.cap)
            weights = jnp.where(visible, jnp.exp(capped - norm[..., None]), 0.0)
            to_v += jnp.einsum(
                "bkgts,btkgd->bskd", weights.astype(back.dtype), back, preferred_element_type=jnp.float32
            )
            slope = jnp.einsum("btkgd,bskd->bkgts", back, values, preferred_element_type=jnp.float32)
            slope = weights * (slope - product[..., None])
            if blocks.cap is not None:
                slope *= 1 - (capped / blocks.cap) ** 2
            slope = (slope * blocks.scale).astype(queries.dtype)
            to_k += jnp.einsum("bkgts,btkgd->bskd", slope, queries, preferred_element_type=jnp.float32)
            more = jnp.einsum("bkgts,bskd->btkgd", slope, keys, preferred_element_type=jnp.float32)
            old = jax.lax.dynamic_index_in_dim(to_q, query, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(to_q, old + more, query, 0), to_k, to_v

        zeros = jnp.zeros(keys.shape, jnp.float32)
        to_q, to_k, to_v = jax.lax.fori_loop(*blocks.queries_of(number, offset), add, (to_q, zeros, zeros))
        return to_q, (to_k.astype(dtype), to_v.astype(dtype))

    to_q, (to_k, to_v) = jax.lax.scan(one_key_block, to_q, (jnp.arange(blocks.keys), k, v, *where[2:]))
    return to_q, to_k, to_v


_flash.defvjp(_flash_forward, _flash_backward)
