"""The gated delta rule (arXiv:2412.06464) in chunks of tokens, and token by token as it is defined.

Each head has a state S (key size, value size) that a token first lets decay, then corrects where its key points:

    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  out = S^T q

`delta_rule` takes a chunk at a time: within one, the corrections are the solution of a triangular system (arXiv:
2406.06484, section 3), and all else is matrix products. A scan over the chunks keeps one state a chunk for the backward
pass, which computes the rest again. Packed rows are exact: what would carry over from one document to the next is left
out of every product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.layout import documents

CHUNK = 64
PRODUCTS = 11  # of two (chunk, chunk) matrices, for each head and chunk: the decays, and the triangular system
_EPSILON = 1e-6
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # float32 on TPUs too


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G R V"],
    decay: Float[Array, "B T G R"],
    beta: Float[Array, "B T G R"],
    segments: Int[Array, "B T"],
    state: Float[Array, "B G R K V"] | None = None,
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B G R K V"]]:
    """Return the outputs, in v's dtype, and the state behind the last token, float32.

    Args:
      q, k: queries and keys, of any length: they are normed here. Each of the G heads serves R heads of values.
      v: values.
      decay: g above, float32, not above 0.
      beta: how much of the correction is made, float32.
      segments: document of each token, 0 for padding, which leaves the state as it is.
      state: the state of an earlier call, whose document the first one here goes on with; by default it is 0.
    """
    batch, length, heads, size = k.shape
    state = jnp.zeros((batch, heads, v.shape[3], size, v.shape[4]), jnp.float32) if state is None else state
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    count = -(-length // chunk)
    segments = jnp.pad(segments, ((0, 0), (0, count * chunk - length)))
    document = documents(segments)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * chunk - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    document = chunks(document)
    carried = jnp.concatenate([jnp.zeros_like(document[:1, :, -1]), document[:-1, :, -1]])
    decay, beta = _without_padding(segments[:, :length], decay, beta)
    inputs = (*map(chunks, (q, k, v, decay, beta)), document, carried)
    state, out = jax.lax.scan(jax.checkpoint(_one_chunk), state.astype(jnp.float32), inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * chunk, *v.shape[2:])[:, :length], state


def delta_rule_reference(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G R V"],
    decay: Float[Array, "B T G R"],
    beta: Float[Array, "B T G R"],
    segments: Int[Array, "B T"],
    state: Float[Array, "B G R K V"] | None = None,
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B G R K V"]]:
    """Return what `delta_rule` returns, token by token."""
    batch, _, heads, size = k.shape
    state = jnp.zeros((batch, heads, v.shape[3], size, v.shape[4]), jnp.float32) if state is None else state
    document = documents(segments)
    begins = jnp.diff(document, axis=1, prepend=0) != 0
    decay, beta = _without_padding(segments, decay, beta)

    def one_token(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, decay, beta, begins = token
        q, k = _normed(q, k)
        state = jnp.where(begins[:, None, None, None, None], 0, state) * jnp.exp(decay)[..., None, None]
        known = jnp.einsum("bgk,bgrkv->bgrv", k, state)
        state += jnp.einsum("bgk,bgrv->bgrkv", k, beta[..., None] * (v - known))
        return state, jnp.einsum("bgk,bgrkv->bgrv", q, state).astype(v.dtype)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay, beta, begins))
    state, out = jax.lax.scan(one_token, state.astype(jnp.float32), tokens)
    return jnp.moveaxis(out, 0, 1), state


def _without_padding(segments: Array, *gates: Array) -> tuple[Array, ...]:
    """Return gates (B, T, G, R) in float32, 0 at padding: nothing decays and nothing is corrected."""
    real = (segments != 0)[..., None, None]
    return tuple(jnp.where(real, gate.astype(jnp.float32), 0) for gate in gates)


def _normed(q: Array, k: Array) -> tuple[Array, Array]:
    """Return queries of length K ** -0.5 and keys of length 1, float32."""
    q, k = (x.astype(jnp.float32) for x in (q, k))
    q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPSILON) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def _one_chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """Return the state behind a chunk of C tokens, and their outputs (B, C, G, R, V)."""
    q, k, v, decay, beta, document, carried = inputs
    dtype, (q, k) = v.dtype, _normed(q, k)
    v, beta = jnp.moveaxis(v.astype(jnp.float32), 1, 3), jnp.moveaxis(beta, 1, 3)  # (B, G, R, C, V), (B, G, R, C)
    decay, index = jnp.moveaxis(decay, 1, 3), jnp.arange(document.shape[1])
    behind = index[:, None] > index
    # What decays between token j and token i is a sum of its own for each pair: the difference of two sums from the
    # chunk's beginning would lose what a strong decay before both leaves no digits for.
    total = _matmul((index[:, None] >= index).astype(jnp.float32), jnp.where(behind, decay[..., None], 0))
    visible = (document[:, :, None] == document[:, None, :]) & (index[:, None] >= index)
    between = jnp.where(visible[:, None, None], jnp.exp(total), 0)
    entering = jnp.where((document == carried[:, None])[:, None, None], jnp.exp(jnp.cumsum(decay, axis=-1)), 0)
    leaving = between[..., -1, :]

    similar = jnp.einsum("bcgk,bdgk->bgcd", k, k)[:, :, None]
    known = entering[..., None] * jnp.einsum("bcgk,bgrkv->bgrcv", k, state)
    inverse = _inverse(jnp.tril(beta[..., None] * similar * between, -1))
    new = inverse @ (beta[..., None] * (v - known))
    seen = jnp.einsum("bcgk,bdgk->bgcd", q, k)[:, :, None] * between
    out = entering[..., None] * jnp.einsum("bcgk,bgrkv->bgrcv", q, state) + seen @ new
    kept = entering[..., -1][..., None, None] * state
    state = kept + jnp.einsum("bcgk,bgrcv->bgrkv", k, leaving[..., None] * new)
    return state, jnp.moveaxis(out, 3, 1).astype(dtype)


@jax.custom_jvp
def _inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Return (I + lower)^-1 of strictly lower triangular matrices, C a power of two.

    From inverses of the blocks on the diagonal follow those of blocks twice as wide: products alone, which matrix units
    are made for, and as exact as substitution (powers of `lower` would not be). They have to be float32 throughout.
    """
    size = lower.shape[-1]
    block = jnp.arange(size)
    inverse = jnp.eye(size, dtype=lower.dtype) + jnp.zeros_like(lower)
    for level in range(size.bit_length() - 1):  # blocks of 2 ** level
        row, column = (block >> level)[:, None], block >> level
        between = jnp.where((row == column + 1) & (row % 2 == 1), lower, 0)
        inverse -= between if level == 0 else _matmul(_matmul(inverse, between), inverse)
    return inverse


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _inverse(*primals)
    return inverse, -_matmul(_matmul(inverse, *tangents), inverse)
