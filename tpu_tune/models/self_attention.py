"""A layer's attention to its own tokens: queries, keys and values, positions, the cache, and attention itself."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_tune.kernels.attention import attention
from tpu_tune.models import rope as rotary
from tpu_tune.models.architecture import LayerKind
from tpu_tune.models.branch import Branch, linear, norm, unweighted_norm
from tpu_tune.tensors import dense

if TYPE_CHECKING:
    from tpu_tune.models.layers import Layer

KeysValues = tuple[Array, Array]  # (B, S, kv heads, head_dim) each
# The modules, by their role in `LayerNames`, that queries, keys and values are made with.
_QKV = ("attention_norm", "qkv", "q", "k", "v", "q_norm", "k_norm")


def self_attention(
    layer: Layer, x: Float[Array, "B T D"], past: KeysValues | None
) -> tuple[Float[Array, "B T HD"], KeysValues | None]:
    """Attend from the normed x to itself and to what came before, without the output projection.

    Returns:
      What was attended to, and all keys and values where there is a cache or another layer uses them.
    """
    arch, context = layer.arch, layer.context
    qkv, gate = layer.each_token(_qkv, x, *_QKV)
    sinks = dense(Branch(layer.leaves).at(layer.names.sinks).leaf("weight")) if layer.names.sinks else None

    def attend(kind: LayerKind, q: Array, *own: Array) -> tuple[Array, KeysValues | None]:
        k, v = own or context.kept[kind.keys_from]
        if kind.rope is not None:
            angles = context.angles[kind.rope]
            q = rotary.scale_queries(rotary.rotate(q, kind.rope, angles), angles)
            k = rotary.rotate(k, kind.rope, angles) if own else k
        if arch.qk_norm_last:
            q, k = _normed_queries_keys(layer, Branch(layer.leaves), q, k)
        entry = (k, v) if layer.keep else None
        if past is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.start, axis=1)
                for old, new in zip(past, (k, v), strict=True)
            )
            entry = (k, v)
        attended = attention(
            q,
            k,
            v,
            context.layout,
            window=kind.window,
            scale=arch.attention_scale,
            cap=arch.attention_soft_cap,
            bias=context.bias,
            sinks=sinks,
            implementation=context.implementation,
            mesh=context.mesh,
        )
        return attended, entry

    # The kinds differ in static facts (windows, rotary tables) that attention's kernels need to know; the products
    # around it are the same, so that only this part is compiled once a kind.
    branches = [functools.partial(attend, kind) for kind in layer.kinds]
    attended, entry = branches[0](*qkv) if len(branches) == 1 else jax.lax.switch(layer.kind, branches, *qkv)
    attended = attended.reshape(*attended.shape[:2], -1)
    return attended if gate is None else attended * jax.nn.sigmoid(gate), entry


def _qkv(layer: Layer, weights: Branch, x: Array) -> tuple[tuple[Array, ...], Array | None]:
    """Return queries (B, T, H, D), keys and values (B, T, K, D) of a layer's input, without positions; and gates.

    A layer that attends to another one's keys and values has queries alone. The gates (B, T, H * D) are of what the
    queries attend to, or None.
    """
    arch, names = layer.arch, layer.names
    heads, (groups, size) = arch.num_heads, arch.heads(layer.kinds[0])
    batch, length, _ = x.shape
    if arch.norm_first:
        x = norm(arch, weights, names.attention_norm, x)
    gate = None
    if names.qkv:  # in the tree, fused columns lie group by group: see `Module.from_torch`
        fused = linear(weights.at(names.qkv), x).reshape(batch, length, groups, heads // groups + 2, size)
        q, k, v = fused[:, :, :, :-2].reshape(batch, length, heads, size), fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        q = linear(weights.at(names.q), x).reshape(batch, length, heads, -1)
        if arch.attention_gate:
            q, gate = q[..., :size], q[..., size:].reshape(batch, length, -1)
        if not names.k:
            return (norm(arch, weights, names.q_norm, q),), gate
        k = linear(weights.at(names.k), x).reshape(batch, length, groups, size)
        v = linear(weights.at(names.v), x).reshape(batch, length, groups, size) if names.v else k
    if arch.value_norm:
        v = unweighted_norm(arch, v).astype(v.dtype)
    if not arch.qk_norm_last:
        q, k = _normed_queries_keys(layer, weights, q, k)
    if arch.qkv_clip is not None:
        q, k, v = (jnp.clip(part, -arch.qkv_clip, arch.qkv_clip) for part in (q, k, v))
    return (q, k, v), gate


def _normed_queries_keys(layer: Layer, weights: Branch, q: Array, k: Array) -> tuple[Array, Array]:
    """Return queries (B, T, H, D) and keys (B, T, K, D), normed where the layer norms them."""
    arch, names = layer.arch, layer.names
    whole = lambda part: part.reshape(*part.shape[:2], -1) if arch.qk_norm == "projection" else part  # noqa: E731
    normed = (norm(arch, weights, name, whole(part)) for name, part in ((names.q_norm, q), (names.k_norm, k)))
    return tuple(part.reshape(before.shape) for part, before in zip(normed, (q, k), strict=True))
