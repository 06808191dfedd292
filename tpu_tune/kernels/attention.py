"""Causal attention with grouped heads, segments and sliding windows, in plain JAX.

`reference` holds all scores at once; `blockwise` walks over blocks of queries and recomputes each block's scores in
the backward pass, so that its memory grows linearly with the sequence. Both take the same arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpu_tune.errors import UserError

QUERY_BLOCK = 512
_AUTO_LIMIT = 2048  # longest key sequence for which `auto` holds all scores

# (query index (B, T), key index (B, S)) -> (B, H, T, S) float32, added to the scores
Bias = Callable[[Int[Array, "B T"], Int[Array, "B S"]], Float[Array, "B H T S"]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_index", "key_index", "query_segments", "key_segments"],
    meta_fields=["causal"],
)
@dataclasses.dataclass(frozen=True)
class Places:
    """Where queries and keys stand: a query sees keys of its own segment, if causal at or before its index.

    Attributes:
      query_index, key_index: place in the row, (B, T) and (B, S).
      query_segments, key_segments: document number; 0 is padding, and no other document sees it.
      causal: whether keys behind the query are hidden from it.
    """

    query_index: Int[Array, "B T"]
    key_index: Int[Array, "B S"]
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    causal: bool = True

    def mask(self, window: int | None) -> Bool[Array, "B T S"]:
        """Return which keys each query sees."""
        seen = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        distance = self.query_index[:, :, None] - self.key_index[:, None, :]
        if self.causal:
            seen &= distance >= 0
        return seen if window is None else seen & (distance < window)


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    places: Places,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    bias: Bias | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H D"]:
    """Softmax attention; H is a multiple of K (grouped heads), scores and softmax are float32.

    Args:
      window: each query sees so many keys, its own place included; None for all.
      scale: of the scores; D ** -0.5 by default.
      cap: soft limit of the scores, see `soft_cap`.
      bias: added to the scores, by place.
      implementation: auto | reference | blockwise.

    Raises:
      UserError: an unknown implementation.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    implementation = chosen(implementation, q.shape[1], k.shape[1])
    if implementation == "reference":
        return reference(q, k, v, places, window, scale, cap, bias)
    if implementation == "blockwise":
        return blockwise(q, k, v, places, window, scale, cap=cap, bias=bias)
    raise UserError(f"model.attention is '{implementation}'; it must be auto, reference or blockwise")


def chosen(implementation: str, queries: int, keys: int) -> str:
    """Return the implementation that a name stands for: what `auto` takes for so many queries and keys, or itself."""
    if implementation != "auto":
        return implementation
    return "blockwise" if keys > _AUTO_LIMIT and queries > QUERY_BLOCK else "reference"


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Return cap * tanh(x / cap), which keeps x between -cap and cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def reference(
    q: Array, k: Array, v: Array, places: Places, window: int | None, scale: float,
    cap: float | None = None, bias: Bias | None = None,
) -> Array:  # fmt: skip
    """Attention with all scores at once."""
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("btghd,bsgd->bghts", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    if bias is not None:
        scores += bias(places.query_index, places.key_index).reshape(scores.shape)
    # A finite floor: a padded query that sees no key must give zeros to the gradient, not NaN.
    scores = jnp.where(places.mask(window)[:, None, None], scores, jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, v).reshape(batch, length, heads, size)


def blockwise(
    q: Array, k: Array, v: Array, places: Places, window: int | None, scale: float,
    block: int = QUERY_BLOCK, cap: float | None = None, bias: Bias | None = None,
) -> Array:  # fmt: skip
    """Attention over blocks of queries, scores recomputed in the backward pass."""
    batch, length, heads, size = q.shape
    short = -length % block

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(_: None, queries: tuple[Array, Array, Array]) -> tuple[None, Array]:
        q_block, index, segments = queries
        here = dataclasses.replace(places, query_index=index, query_segments=segments)
        return None, reference(q_block, k, v, here, window, scale, cap, bias)

    _, out = jax.lax.scan(one_block, None, (blocks(q), blocks(places.query_index), blocks(places.query_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, size)[:, :length]
