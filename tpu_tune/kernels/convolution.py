"""A causal convolution along the tokens, one filter a channel, that starts anew at every document of a packed row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.layout import documents


def causal_convolution(
    x: Float[Array, "B T C"],
    weight: Float[Array, "K C"],
    segments: Int[Array, "B T"],
    before: Float[Array, "B K-1 C"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """Return sum_j weight[j] * x[t - (K - 1) + j], with zeros for what is of another document, in x's dtype.

    Args:
      x: the tokens' channels.
      weight: the filters; the last tap is the token's own.
      segments: document of each token, 0 for padding, which counts for nothing.
      before: the last K - 1 tokens' channels of an earlier call, whose document the first one here goes on with; by
        default there were none.

    Returns:
      The convolution, summed in float32, and what the next call's `before` is.
    """
    (batch, length, channels), taps = x.shape, weight.shape[0] - 1
    real, document = segments != 0, documents(segments)
    kept = jnp.where(real[..., None], x, 0)
    kept = jnp.concatenate([jnp.zeros((batch, taps, channels), x.dtype), kept], axis=1)
    document = jnp.concatenate([jnp.zeros((batch, taps), document.dtype), document], axis=1)
    has_any = jnp.any(real, axis=1)
    if before is not None:
        # They stand right before the first real token, wherever padding on the left has moved it.
        first = jnp.where(has_any, jnp.argmax(real, axis=1), length)
        put = jax.vmap(lambda row, taps, start: jax.lax.dynamic_update_slice_in_dim(row, taps, start, axis=0))
        kept = put(kept, before.astype(x.dtype), first)
    total = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps + 1):
        same = document[:, tap : tap + length] == document[:, taps:]
        shifted = jnp.where(same[..., None], kept[:, tap : tap + length], 0)
        total += weight[tap].astype(jnp.float32) * shifted.astype(jnp.float32)
    end = jnp.where(has_any, length - jnp.argmax(real[:, ::-1], axis=1), length)  # one behind the last real token
    cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, taps, axis=0))
    same = cut(document, end) == document[:, -1:]
    return total.astype(x.dtype), jnp.where(same[..., None], cut(kept, end), 0)
