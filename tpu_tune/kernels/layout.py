"""What attention implementations share: who sees whom, the soft cap on scores, and sinks behind the softmax."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# (query index (B, T), key index (B, S)) -> (B, H, T, S) float32, added to the scores
Bias = Callable[[Int[Array, "B T"], Int[Array, "B S"]], Float[Array, "B H T S"]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_index", "key_index", "query_segments", "key_segments"],
    meta_fields=["causal", "packed"],
)
@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where queries and keys stand: a query sees keys of its own segment, if causal at or before its index.

    Attributes:
      query_index, key_index: position in the row, (B, T) and (B, S).
      query_segments, key_segments: document number; 0 is padding, and no other document sees it.
      causal: whether keys behind the query are hidden from it.
      packed: whether a row may hold several documents. False: one from the row's beginning, padding behind it; what
        padded queries see then does not matter, and causal kernels need no segments.
    """

    query_index: Int[Array, "B T"]
    key_index: Int[Array, "B S"]
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    causal: bool = True
    packed: bool = True

    def mask(self, window: int | None) -> Bool[Array, "B T S"]:
        """Return which keys each query sees."""
        visible = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        distance = self.query_index[:, :, None] - self.key_index[:, None, :]
        if self.causal:
            visible &= distance >= 0
        return visible if window is None else visible & (distance < window)


def documents(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number a row's documents from 0 in their order; padding belongs to the document that it follows, or precedes.

    Args:
      segments: document of each token, 0 for padding.
    """
    real = segments != 0
    latest = jax.lax.cummax(jnp.where(real, jnp.arange(segments.shape[1]), -1), axis=1)
    own = jnp.where(latest < 0, jnp.argmax(real, axis=1)[:, None], latest)
    filled = jnp.take_along_axis(segments, own, axis=1)
    return jnp.cumsum(jnp.diff(filled, axis=1, prepend=filled[:, :1]) != 0, axis=1)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Return cap * tanh(x / cap), which keeps x between -cap and cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def with_sinks(
    out: Float[Array, "B T H D"], normaliser: Float[Array, "B T H"], sinks: Float[Array, " H"] | None
) -> Float[Array, "B T H D"]:
    """Return what attention gives when its softmax has a sink beside the keys; `out` where there is none.

    Args:
      out: attention's result without the sinks.
      normaliser: log-sum-exp of each query's scores, float32.
      sinks: a logit for each head.
    """
    if sinks is None:
        return out
    share = jax.nn.sigmoid(normaliser - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)
