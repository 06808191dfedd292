"""What the decoder is made of: norms, attention, MLP, and one layer of them, as functions of an Architecture.

`Branch` gives a layer's leaves the shape of a module. Nothing here knows how layers are stacked or which family they
belong to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.attention import attention
from tpu_tune.kernels.places import Bias, Places, soft_cap
from tpu_tune.models import rope as rotary
from tpu_tune.models.activations import ACTIVATIONS
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.tensors import embed, matmul, unembed

KeysValues = tuple[Array, Array]  # (B, S, kv heads, head_dim) each


class Branch(nnx.Module):
    """A module without mathematics of its own: children, and leaves named `weight` and `bias`."""

    def __init__(self, leaves: Mapping[str, Any]):
        """Hang each leaf at its dotted path below this module."""
        children: dict[str, dict[str, Any]] = {}
        for path, leaf in leaves.items():
            name, _, rest = path.partition(".")
            if rest:
                children.setdefault(name, {})[rest] = leaf
            else:
                setattr(self, name, nnx.Param(leaf))
        for name, below in children.items():
            setattr(self, name, Branch(below))

    def at(self, path: str) -> Branch:
        """Return the module at a dotted path."""
        return functools.reduce(getattr, path.split("."), self)

    def leaf(self, name: str) -> Any:
        """Return the leaf of that name here, or None."""
        return getattr(self, name).get_value() if hasattr(self, name) else None


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What all layers see beside their own weights.

    Attributes:
      places: of queries and keys.
      angles: cosines and sines of each rotary embedding.
      implementation: of attention.
      mesh: for its kernels; None on one device.
      bias: on the scores, from learned relative positions; or None.
      memory: an encoder's output and its places, for cross-attention; or None.
      start: where new keys and values are written in a cache, None without one.
    """

    places: Places
    angles: Mapping[rotary.Rope, tuple[Array, Array]]
    implementation: str
    mesh: Mesh | None = None
    bias: Bias | None = None
    memory: tuple[Array | None, Places] | None = None
    start: Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["own", "cross"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of one layer, or of all on a leading axis: of the tokens so far, and of an encoder's output."""

    own: KeysValues | None = None
    cross: KeysValues | None = None


def layer(
    arch: Architecture, weights: Branch, x: Float[Array, "B T D"], kind: Array | int, around: Surroundings, past: Past
) -> tuple[Float[Array, "B T D"], Past]:
    """Run one layer.

    Args:
      arch: the facts.
      weights: this layer's.
      x: hidden states.
      kind: index into `arch.kinds`.
      around: what all layers share.
      past: what the cache holds for this layer.

    Returns:
      New hidden states, and what the cache is to hold.
    """
    names = arch.names
    if not arch.norm_first:
        attended, own = _self_attention(arch, weights, x, kind, around, past.own)
        x = norm(arch, weights.at(names.attention_norm), x + attended)
        return norm(arch, weights.at(names.mlp_norm), x + _mlp(arch, weights, x)), Past(own)
    normed = norm(arch, weights.at(names.attention_norm), x)
    attended, own = _self_attention(arch, weights, normed, kind, around, past.own)
    if names.attention_out_norm:
        attended = norm(arch, weights.at(names.attention_out_norm), attended)
    if arch.residual == "parallel":
        read = norm(arch, weights.at(names.mlp_norm), x) if names.mlp_norm else normed
        return x + attended + _mlp(arch, weights, read), Past(own)
    x, cross = x + attended, None
    if names.cross_q:
        seen, cross = _cross_attention(arch, weights, norm(arch, weights.at(names.cross_norm), x), around, past.cross)
        x = x + seen
    fed = _mlp(arch, weights, norm(arch, weights.at(names.mlp_norm), x))
    if names.mlp_out_norm:
        fed = norm(arch, weights.at(names.mlp_out_norm), fed)
    return x + fed, Past(own, cross)


def _self_attention(
    arch: Architecture, weights: Branch, x: Array, kind: Array | int, around: Surroundings, past: KeysValues | None
) -> tuple[Array, KeysValues | None]:
    names, heads, groups, size = arch.names, arch.num_heads, arch.num_kv_heads, arch.head_dim
    batch, length, _ = x.shape
    if names.qkv:  # in the tree, fused columns lie group by group: see `Module.from_torch`
        fused = linear(weights.at(names.qkv), x).reshape(batch, length, groups, heads // groups + 2, size)
        q, k, v = fused[:, :, :, :-2].reshape(batch, length, heads, size), fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        q = linear(weights.at(names.q), x).reshape(batch, length, heads, size)
        k = linear(weights.at(names.k), x).reshape(batch, length, groups, size)
        v = linear(weights.at(names.v), x).reshape(batch, length, groups, size)
    if names.q_norm:
        q, k = norm(arch, weights.at(names.q_norm), q), norm(arch, weights.at(names.k_norm), k)

    def attend(kind: LayerKind, q: Array, k: Array, v: Array) -> tuple[Array, KeysValues | None]:
        if kind.rope is not None:
            q, k = (rotary.rotate(part, kind.rope, *around.angles[kind.rope]) for part in (q, k))
        entry = None
        if past is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), around.start, axis=1)
                for old, new in zip(past, (k, v), strict=True)
            )
            entry = (k, v)
        seen = attention(
            q, k, v, around.places, window=kind.window, scale=arch.attention_scale, cap=arch.attention_soft_cap,
            bias=around.bias, implementation=around.implementation, mesh=around.mesh,
        )  # fmt: skip
        return seen, entry

    # The kinds differ in static facts (windows, rotary tables) that attention's kernels need to know; the products
    # around it are the same, so that only this part is compiled once a kind.
    branches = [functools.partial(attend, kind) for kind in arch.kinds]
    seen, entry = branches[0](q, k, v) if len(branches) == 1 else jax.lax.switch(kind, branches, q, k, v)
    return linear(weights.at(names.o), seen.reshape(batch, length, heads * size)), entry


def _cross_attention(
    arch: Architecture, weights: Branch, x: Array, around: Surroundings, past: KeysValues | None
) -> tuple[Array, KeysValues]:
    """Attend to the encoder: its keys and values are made where its output is at hand, else taken from the cache."""
    names, heads, groups, size = arch.names, arch.num_heads, arch.num_kv_heads, arch.head_dim
    batch, length, _ = x.shape
    encoded, places = around.memory
    q = linear(weights.at(names.cross_q), x).reshape(batch, length, heads, size)
    if encoded is None:
        k, v = past
    else:
        k, v = (
            linear(weights.at(name), encoded).reshape(batch, -1, groups, size)
            for name in (names.cross_k, names.cross_v)
        )
    seen = attention(q, k, v, places, scale=arch.attention_scale, implementation=around.implementation)
    return linear(weights.at(names.cross_o), seen.reshape(batch, length, heads * size)), (k, v)


def _mlp(arch: Architecture, weights: Branch, x: Array) -> Array:
    names, activation = arch.names, ACTIVATIONS[arch.activation]
    if names.gate_up:
        both = linear(weights.at(names.gate_up), x)
        both = both.reshape(*x.shape[:-1], -1, 2, arch.gate_unit // 2)
        gate, up = (both[..., part, :].reshape(*x.shape[:-1], -1) for part in (0, 1))
        inner = activation(gate) * up
    elif names.gate:
        inner = activation(linear(weights.at(names.gate), x)) * linear(weights.at(names.up), x)
    else:
        inner = activation(linear(weights.at(names.up), x))
    return linear(weights.at(names.down), inner)


def linear(module: Branch, x: Array) -> Array:
    """Return x @ weight + bias in x's dtype."""
    y = checkpoint_name(matmul(x, module.leaf("weight")), "projection")
    bias = module.leaf("bias")
    return y if bias is None else y + _plain(bias).astype(y.dtype)


def norm(arch: Architecture, module: Branch, x: Array) -> Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) in float32.

    A plain RMSNorm is rounded before the weight, one whose weight is stored with an offset after it, as HF does.
    """
    wide = x.astype(jnp.float32)
    if arch.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + arch.norm_eps)
    weight, bias = _plain(module.leaf("weight")), module.leaf("bias")
    if bias is None and not arch.norm_offset:
        return weight.astype(x.dtype) * normed.astype(x.dtype)
    scaled = (weight.astype(jnp.float32) + arch.norm_offset) * normed
    return (scaled if bias is None else scaled + _plain(bias).astype(jnp.float32)).astype(x.dtype)


def _plain(leaf: Any) -> Array:
    """Return a norm's weight or a bias; a trained copy (modules_to_save) counts as itself."""
    return getattr(leaf, "value", leaf)


def relative_bias(arch: Architecture, table: Any) -> Bias:
    """Return the function from places to the learned bias on the scores, (B, heads, T, S) float32."""

    def bias(query_index: Int[Array, "B T"], key_index: Int[Array, "B S"]) -> Float[Array, "B H T S"]:
        distance = key_index[:, None, :] - query_index[:, :, None]
        return jnp.moveaxis(embed(buckets_of(arch, distance), table, jnp.float32), -1, 1)

    return bias


def buckets_of(arch: Architecture, distance: Int[Array, "..."]) -> Int[Array, "..."]:
    """T5's buckets (arXiv:1910.10683, section 2.1): exact to half their number, then logarithmic to `max_distance`.

    Without `causal`, one half of the buckets is for what lies ahead.
    """
    count = arch.relative.buckets
    if arch.causal:
        first, distance = 0, jnp.maximum(-distance, 0)
    else:
        count //= 2
        first, distance = jnp.where(distance > 0, count, 0), jnp.abs(distance)
    exact = count // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(arch.relative.max_distance / exact)
    far = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
    return first + jnp.where(distance < exact, distance, far)


def apply_head(
    arch: Architecture, leaves: Mapping[str, Any], hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch V"]:
    """Apply `Decoder.head_leaves`, as a pure function for the chunked cross-entropy."""
    if arch.head_scale != 1.0:
        hidden = hidden * jnp.asarray(arch.head_scale, hidden.dtype)
    if "embedding" in leaves:
        logits = unembed(hidden, leaves["embedding"])
    else:
        logits = matmul(hidden, leaves["weight"])
    if "bias" in leaves:
        logits = logits + leaves["bias"].astype(logits.dtype)
    return soft_cap(logits, arch.logit_soft_cap)
