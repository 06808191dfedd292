"""A gated DeltaNet (arXiv:2412.06464) in the place of a layer's attention, up to the output projection.

Convolution, gates and the state's recurrence run over all tokens of a row and start anew at every document; the
products before them are of each token alone. `Past.own` holds the convolution's last inputs and the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_tune.kernels.convolution import causal_convolution
from tpu_tune.kernels.delta_rule import delta_rule
from tpu_tune.models.activations import ACTIVATIONS
from tpu_tune.models.branch import Branch, linear, norm
from tpu_tune.models.delta_modules import DeltaNet
from tpu_tune.tensors import dense

if TYPE_CHECKING:
    from tpu_tune.models.layers import Layer

TapsState = tuple[Array, Array]  # (B, taps - 1, channels), and float32 (B, key heads, shared, key dim, value dim)
_IN = ("attention_norm", "delta_qkv", "delta_qkvz", "delta_z", "delta_ba", "delta_b", "delta_a")


def empty_taps_state(delta: DeltaNet, batch: int, dtype: Any) -> TapsState:
    """Return what such a layer keeps before the first token."""
    state = (batch, delta.key_heads, delta.shared, delta.key_dim, delta.value_dim)
    return jnp.zeros((batch, delta.taps - 1, delta.channels), dtype), jnp.zeros(state, jnp.float32)


def delta_net(
    layer: Layer, x: Float[Array, "B T D"], past: TapsState | None
) -> tuple[Float[Array, "B T HV"], TapsState | None]:
    """Return each head's normed and gated outputs of the normed x, side by side, and what the cache is to hold."""
    delta, names, weights = layer.kinds[0].delta, layer.names, Branch(layer.leaves)
    segments = layer.context.layout.query_segments
    mixed, z, b, a = layer.each_token(_projected, x, *_IN)
    leaf = lambda name: dense(weights.at(name).leaf("weight"))  # noqa: E731
    before, state = (None, None) if past is None else past
    mixed, taps = causal_convolution(mixed, leaf(names.delta_conv), segments, before)
    mixed = ACTIVATIONS[layer.arch.activation](mixed.astype(jnp.float32)).astype(x.dtype)
    mixed = mixed.reshape(*x.shape[:2], delta.key_heads, delta.unit)
    q, k, v = jnp.split(mixed, (delta.key_dim, 2 * delta.key_dim), axis=-1)
    v = v.reshape(*v.shape[:3], delta.shared, delta.value_dim)
    by_head = (delta.key_heads, delta.shared)
    rate, shift = (leaf(name).astype(jnp.float32).reshape(by_head) for name in (names.delta_rate, names.delta_shift))
    decay = -jnp.exp(rate) * jax.nn.softplus(a.astype(jnp.float32) + shift)
    out, state = delta_rule(q, k, v, decay, jax.nn.sigmoid(b.astype(jnp.float32)), segments, state)
    out = layer.each_token(_gated, (out, z), "delta_norm")
    return out, None if past is None else (taps, state)


def _projected(layer: Layer, weights: Branch, x: Array) -> tuple[Array, Array, Array, Array]:
    """Return the convolution's channels (B, T, C), gates z (B, T, G, R, V), and b and a (B, T, G, R)."""
    delta, names = layer.kinds[0].delta, layer.names
    x = norm(layer.arch, weights, names.attention_norm, x)
    project = lambda name: linear(weights.at(name), x).reshape(*x.shape[:2], delta.key_heads, -1)  # noqa: E731
    if names.delta_qkvz:
        mixed, z = jnp.split(project(names.delta_qkvz), (delta.unit,), axis=-1)
        b, a = jnp.split(project(names.delta_ba), 2, axis=-1)
    else:
        mixed, z, b, a = map(project, (names.delta_qkv, names.delta_z, names.delta_b, names.delta_a))
    z = z.reshape(*z.shape[:3], delta.shared, delta.value_dim)
    return mixed.reshape(*x.shape[:2], -1), z, b, a


def _gated(layer: Layer, weights: Branch, tokens: tuple[Array, Array]) -> Array:
    """Return weight * rmsnorm(out) * silu(z) of every head, (B, T, G * R * V)."""
    out, z = tokens
    wide = out.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + layer.arch.norm_eps)
    weight = dense(weights.at(layer.names.delta_norm).leaf("weight"))
    # Hugging Face rounds to the activations' dtype before the weight, which norms elsewhere in the model do after it.
    scaled = weight * normed.astype(out.dtype).astype(jnp.float32)
    return (scaled * jax.nn.silu(z.astype(jnp.float32))).astype(out.dtype).reshape(*out.shape[:2], -1)
